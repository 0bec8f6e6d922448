"""`hybridlm plan`, top to bottom."""

import sys
from pathlib import Path
from typing import Any

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.plan.advice import smallest_change
from hybridlm.plan.compile import compile_step
from hybridlm.plan.report import make_report
from hybridlm.plan.search import search
from hybridlm.plan.text import describe, ranking, verdict
from hybridlm.plan.topology import Topology, prepare_process, topology
from hybridlm.train.executable import save_executable

EXIT_DOES_NOT_FIT = 3


def plan(name: str, config: Config, where: str, *, advice: bool = True, save: Path | None = None) -> tuple[int, Any]:
    """Compile the step of `config` for the topology `where`, and say what it is. Returns exit code and report.

    Raises ConfigError where the input is wrong.
    """
    on = prepared(where)
    compiled = compile_step(config, on)
    report = make_report(compiled)
    print(describe(name, report))
    found = report.to_json() | {"config": config_io.to_dict(config)}
    if report.fits:
        if save is not None:
            assert compiled.dump.compiled is not None
            size = save_executable(save, compiled.dump.compiled, compiled.lowered, compiled.mesh, config)
            print(
                f"\nsaved the executable to {save}, {size:,} bytes; `hybridlm train {name} --executable {save}` runs it"
            )
        return 0, found
    if advice:
        sys.stdout.flush()
        best = smallest_change(config, on, report, _say)
        if best is None:
            print(
                "\nnothing makes it fit of remat, microbatches, fsdp, a smaller batch and up to eight times the chips"
            )
        else:
            change, changed = best
            print(f"\nthe smallest change that was found: {change.flags}; with it the step {verdict(changed)}")
            found["smallest_change"] = {"flags": change.flags, "report": changed.to_json()}
    return EXIT_DOES_NOT_FIT, found


def plan_search(name: str, config: Config, where: str, *, compiles: int) -> tuple[int, Any]:
    """Compile what promises most of all meshes, remat policies and batches. Returns exit code and the ranked ones."""
    ranked = search(config, prepared(where), compiles=compiles, say=_say)
    fits = any(found.report.fits for found in ranked)
    print(f"{name} on {where}: the best {len(ranked)} of what was compiled, by the middle of their roofline estimates")
    print(ranking([(found.flags, found.report) for found in ranked]))
    return 0 if fits else EXIT_DOES_NOT_FIT, {
        "ranked": [{"flags": found.flags, "report": found.report.to_json()} for found in ranked]
    }


def prepared(where: str) -> Topology:
    """The topology that is named so, in a process that can compile for it."""
    found = topology(where)
    prepare_process(found)
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
