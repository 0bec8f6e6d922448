"""Kills a run hundreds of times at random moments, and proves that nothing of it was lost or repeated.

    PYTHONPATH=.:kernels python -m tests.faults.kill_soak --kills 200 --out DIR

One process of one device trains a tiny model, with a checkpoint every 5 steps. It gets SIGKILL at a random moment, a
quarter of them before its first step, and is started again, until it is done; then its losses, its last arrays and the
tokens of its batches are compared, bit by bit, with those of a run that nothing happened to. As many runs are killed in
this way as it takes. Exit code 1 says that one of them differed.
"""

import argparse
import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from hybridlm.config import Checkpoint
from tests import processes
from tests.corpora import write_corpus
from tests.faults.sites import Site, quick_config
from tests.processes import Running

CHECKPOINT_EVERY = 5
SECONDS_PER_STEP = 0.2
"""That a run may take: at most, on a busy machine, with its share of a save."""
SHARE_OF_STEPS = 0.25
"""Of the time to the first step, within which a process is killed after it: a dozen steps and a few saves."""


def partial_saves(site: Site) -> set[str]:
    """Names and beginnings of checkpoints that were never committed."""
    directory = site.run / "checkpoints"
    return (
        {f"{path.name} {path.stat().st_mtime_ns}" for path in directory.glob("*tmp*")} if directory.is_dir() else set()
    )


def kill(site: Site, rng: np.random.Generator, seconds_to_first_step: float) -> tuple[str | None, float | None]:
    """Start the run, and kill it. What it was doing, None where it was done before; the seconds to its first step."""
    began, partial = time.monotonic(), partial_saves(site)
    running = site.start()
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0.0, seconds_to_first_step))
        first_step = None
    else:
        running.wait_until(lambda: "\nstep " in running.said() or running.processes[0].poll() is not None)
        first_step = time.monotonic() - began
        time.sleep(rng.uniform(0.0, SHARE_OF_STEPS * first_step))
    running.kill()
    [ended] = running.ended()
    if ended.code == 0:
        return None, first_step
    assert ended.code == -signal.SIGKILL, running.said()
    return doing(running, bool(partial_saves(site) - partial)), first_step


def doing(running: Running, saving: bool) -> str:
    """What a process was about when it was killed."""
    out = running.said()
    if saving:
        return "saving"
    if "devices " not in out:
        return "starting"
    return "stepping" if "compiled the training step" in out else "restoring or compiling"


def soak(kills: int, steps: int, seed: int, out: Path) -> Counter[str]:
    """Counts, of all runs together. Raises AssertionError where one differs from the undisturbed one."""
    rng = np.random.default_rng(seed)
    config = quick_config(
        write_corpus(out / "text", files=6, sentences=30),
        layers=1,
        steps=steps,
        evaluate_every=50,
        checkpoint=Checkpoint(every=CHECKPOINT_EVERY, keep=3),
    )
    counts: Counter[str] = Counter()
    environment = processes.environment(out / "compilations")
    with processes.starting(environment, out, processes.SECONDS + steps * SECONDS_PER_STEP) as start:
        (out / "undisturbed").mkdir()
        undisturbed = Site(out / "undisturbed", config, start)
        undisturbed.finish()
        seconds_to_first_step, killed = 5.0, 0
        while killed < kills:
            counts["runs"] += 1
            directory = out / f"run{counts['runs']}"
            directory.mkdir()
            site = Site(directory, config, start)
            done = False
            while killed < kills and not done:
                counts["checkpoints found"] += len(site.saved())
                what, first_step = kill(site, rng, seconds_to_first_step)
                seconds_to_first_step = seconds_to_first_step if first_step is None else first_step
                done = what is None
                if what is not None:
                    killed += 1
                    counts[f"killed while {what}"] += 1
                    print(f"{killed}/{kills} run {counts['runs']}, saved up to {site.resumes_at()}: {what}", flush=True)
            site.finish()
            site.assert_same(undisturbed)
            handed = len((directory / "handed.jsonl").read_text().splitlines())
            counts["steps"] += steps
            counts["steps run again"] += handed - steps
            counts["checkpoints found damaged"] += len(site.events("quarantined"))
            counts["checkpoints set aside incomplete"] += len(list((site.run / "checkpoints").glob("incomplete.*")))
            print(f"run {counts['runs']}: the same as the undisturbed one, bit by bit", flush=True)
    counts["kills"] = killed
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of each run (default: 400)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new directory")
    args = parser.parse_args()
    began = time.monotonic()
    try:
        counts = soak(args.kills, args.steps, args.seed, args.out)
    except AssertionError as difference:
        print(f"different: {difference}", file=sys.stderr)
        return 1
    print(json.dumps(counts | {"seconds": round(time.monotonic() - began)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
