"""What the compiler makes of MaxText's training step of a dense model, beside what `hybridlm plan` says of ours.

    python3.12 -m venv ~/maxtext && . ~/maxtext/bin/activate
    pip install "jax[tpu]>=0.11.1" flax optax aqtp qwix tokamax omegaconf pydantic orbax-checkpoint jaxtyping beartype \
        psutil drjax jinja2 pathwaysutils huggingface_hub transformers grain pillow tiktoken sentencepiece sympy \
        ml_collections cloud-accelerator-diagnostics ml-goodput-measurement jsonlines
    pip install --no-deps maxtext==0.2.5
    export PYTHONPATH=.:kernels TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu
    python kernels/benchmarks/maxtext_plan.py compile llama2-7b.json model_name=llama2-7b compile_topology=v5p-128 \
        per_device_batch_size=8 max_target_length=2048
    python -m hybridlm.cli plan kernels/benchmarks/llama2_7b.py --topology v5p:4x4x4 --json ours.json
    python -m hybridlm.cli plan griffin_7b --topology v5p:4x4x4 --model.remat=full --json griffin_7b.json
    python kernels/benchmarks/maxtext_plan.py compare llama2-7b.json ours.json griffin_7b.json

`compile` takes fields of MaxText's base.yml as its `train_compile` does, and calls what that calls; nothing is patched.
XLA's dump of the step is then read by the code that reads ours. v5p-128 is MaxText's name of the 64 chips of v5p:4x4x4.
No column has the FLOPs of attention's kernel, JAX's splash attention in all, which does not tell them.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
FIELDS = (
    "run_name=plan",
    "base_output_directory=unused",
    "compile_topology_num_slices=1",
    "skip_jax_distributed_system=True",
    "enable_checkpointing=False",
    "log_config=False",
)


def compile_step(fields: list[str]) -> dict[str, Any]:
    """MaxText's step compiled for the topology that its fields name; keys as in the JSON of `hybridlm plan`."""
    import jax
    from flax.core.spmd import logical_axis_rules
    from hybridlm_kernels.bench.hlo import Program
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train, train_compile
    from maxtext.utils import max_utils, maxtext_utils, sharding

    from hybridlm.plan.collectives import collectives
    from hybridlm.plan.costs import costs, kernels_without_flops
    from hybridlm.plan.dump import compile_and_dump
    from hybridlm.plan.memory import memory

    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class State:
        params: Any
        others: Any

    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    config = pyconfig.initialize(["", str(Path(pyconfig.__file__).parent / "base.yml"), *FIELDS, *fields])
    mesh = train_compile.get_topology_mesh(config)
    started = time.monotonic()
    (state, batch), _, shardings, _, graph = train_compile.get_shaped_inputs(mesh, config)
    of_params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, of_inputs, of_outputs, _, donated = maxtext_utils.get_functional_train_with_signature(
        train.train_step,
        sharding.get_input_data_sharding(config, mesh),
        sharding.build_zero1_input_state_mesh_shardings(config, shardings, of_params),
        graph,
        config,
        of_params,
    )
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        jitted = jax.jit(step, in_shardings=of_inputs, out_shardings=of_outputs, donate_argnums=donated)
        lowered = jitted.lower(state, batch)
    traced = time.monotonic()
    dump = compile_and_dump(lowered, max_utils.parse_libtpu_flags_to_dict(config.compile_xla_flags))
    done = time.monotonic()
    program = Program(dump.hlo)
    held = State(state["model"], [state[name] for name in state if name != "model"])
    return {
        "num_devices": mesh.size,
        "trace_seconds": traced - started,
        "compile_seconds": done - traced,
        "memory": asdict(memory(dump, program, held, batch)),
        "model_flops": maxtext_utils.calculate_tflops_training_per_device(config)[0] * 1e12 * mesh.size,
        "costs": {scope: asdict(cost) for scope, cost in costs(program).items()},
        "unknown_kernels": kernels_without_flops(program),
        "collectives": [asdict(found) for found in collectives(program, mesh)],
    }


def compare(steps: dict[str, dict[str, Any]]) -> str:
    """A table with one column per step; bytes and FLOPs are those of one device."""
    cells: dict[str, Callable[[dict[str, Any]], float]] = {
        f"{kind}, GiB": lambda step, kind=kind: step["memory"][kind] / GIB
        for kind in ("parameters", "optimizer", "batch", "activations", "temporaries", "code", "total")
    }
    cells["model TFLOP"] = lambda step: step["model_flops"] / step["num_devices"] / 1e12
    cells["compiled TFLOP"] = lambda step: sum(cost["flops"] for cost in step["costs"].values()) / 1e12
    cells["HBM traffic, GB"] = lambda step: sum(cost["hbm_bytes"] for cost in step["costs"].values()) / 1e9
    for kind in sorted({f"{c['kind']} {c['dtype']}" for step in steps.values() for c in step["collectives"]}):
        cells[f"{kind}, GB"] = lambda step, kind=kind: _exchanged(step, "bytes")[kind] / 1e9
        cells[f"{kind}, runs"] = lambda step, kind=kind: _exchanged(step)[kind]
    cells["overlapped, % of bytes"] = _overlapped
    cells["trace, s"] = lambda step: step["trace_seconds"]
    cells["compile, s"] = lambda step: step["compile_seconds"]
    width = max(map(len, cells))
    lines = [" ".join([" " * width, *(f"{name:>24}" for name in steps)])]
    for label, value in cells.items():
        lines.append(" ".join([label.ljust(width), *(f"{value(step):24,.3f}" for step in steps.values())]))
    return "\n".join(lines)


def _exchanged(step: dict[str, Any], unit: str | None = None) -> Counter[str]:
    """Runs of each kind of collective, or the sum of `unit` over its runs."""
    total: Counter[str] = Counter()
    for c in step["collectives"]:
        total[f"{c['kind']} {c['dtype']}"] += c["runs"] * (c[unit] if unit else 1)
    return total


def _overlapped(step: dict[str, Any]) -> float:
    moved = sum(c["runs"] * c["bytes"] for c in step["collectives"])
    return 100 * sum(c["runs"] * c["bytes"] for c in step["collectives"] if c["asynchronous"]) / moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile", help="write what MaxText's step is as JSON")
    compiling.add_argument("json", type=Path)
    compiling.add_argument("fields", nargs="+", help="model_name=llama2-7b and more, of MaxText's base.yml")
    comparing = commands.add_parser("compare", help="print such files and those of `hybridlm plan` side by side")
    comparing.add_argument("json", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "compile":
        args.json.write_text(json.dumps(compile_step(args.fields), indent=1))
    else:
        print(compare({path.stem: json.loads(path.read_text()) for path in args.json}))


if __name__ == "__main__":
    main()
