"""Weak, strong and sequence scaling, read from training steps compiled for devices that are not there.

    export PYTHONPATH=.:kernels TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu
    python kernels/benchmarks/scaling.py weak griffin_1b
    python kernels/benchmarks/scaling.py strong griffin_1b --kind v5p
    python kernels/benchmarks/scaling.py sequence griffin_1b gated_deltanet_1b transformer_1b

weak        every chip has `--rows` sequences: what a chip holds and sends should stay as it is.
strong      `--batch` sequences in all; where there are more chips than sequences, `context` cuts them.
sequence    `--tokens` tokens in a step, in ever longer sequences, cut over `context` where there are fewer of them than
            chips. FLOPs and bytes per token of recurrences and windows should stay as they are.

Parameters are spread over a slice (`fsdp`), the batch over slices too; v5e slices end at 256 chips, so that 1,024 chips
are four of them. `--layers` compiles shorter stacks, in which the parts of a layer are as in the whole recipe. Each row
is printed when it is there: a step takes half a minute to several to compile. Bytes are those of one chip in one step;
a collective's are what `hybridlm plan` counts. FLOPs per token are given twice: those of the model, without what is
computed again in the backward pass, and those of matrix products in the program, which lack JAX's attention kernel.
"""

import argparse
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator

from hybridlm.config import Config, Mesh
from hybridlm.config_io import load_config
from hybridlm.plan.compile import compile_step
from hybridlm.plan.report import Report, make_report
from hybridlm.plan.topology import Topology, prepare_process, topology

CHIPS = (16, 64, 256, 1024, 4096)
SLICES = {
    "v5e": ("v5e:4x4", "v5e:8x8", "v5e:16x16", "v5e:16x16*4", "v5e:16x16*16"),
    "v5p": ("v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16", "v5p:16x16x16"),
    "v6e": ("v6e:4x4", "v6e:8x8", "v6e:16x16", "v6e:16x16*4", "v6e:16x16*16"),
}
"""Of `CHIPS`, by kind."""
LENGTHS = tuple(4**n * 1024 for n in range(1, 6))
GIB, GB = 2**30, 10**9
Case = tuple[Config, Topology]
Row = dict[str, str]


def laid_out(config: Config, where: Topology, batch: int, length: int) -> Config:
    """`batch` sequences of `length`, on as many chips each as there are chips for."""
    context = max(1, where.num_devices // batch)
    mesh = Mesh(data=1, fsdp=-1, context=context)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seq_len=length),
        train=dataclasses.replace(config.train, batch_size=batch, num_microbatches=1),
        sharding=dataclasses.replace(config.sharding, mesh=mesh),
    )


def with_layers(config: Config, layers: int | None) -> Config:
    return (
        config
        if layers is None
        else dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=layers))
    )


def report_of(case: Case) -> Report:
    return make_report(compile_step(*case))


def by_chips(report: Report) -> Row:
    held = report.memory
    return shape(report) | {
        "sequences": f"{report.batch_size:,}",
        "tokens a chip": f"{report.tokens // report.num_devices:,}",
        "state": f"{(held.parameters + held.optimizer) / GIB:.2f}",
        "activations": f"{held.activations / GIB:.2f}",
        "temporaries": f"{held.temporaries / GIB:.2f}",
        "total GiB": total(report),
        "collectives": f"{sum(c.runs for c in report.collectives):,}",
        "GB by kind": moved(report, lambda c: c.kind),
        "GB by axes": moved(report, lambda c: "+".join(c.axes)),
        "MFLOP a token": f"{flops_per_token(report) / 1e6:,.0f}",
        "compile s": f"{report.compile_seconds:.0f}",
    }


def by_length(report: Report) -> Row:
    a_token = report.num_devices / report.tokens
    hbm = sum(cost.hbm_bytes for cost in report.costs.values())
    sent = sum(c.runs * c.bytes for c in report.collectives)
    along_time = sum(c.runs * c.bytes for c in report.collectives if c.axes == ("context",))
    return {"length": f"{report.seq_len:,}"} | shape(report) | {
        "sequences": f"{report.batch_size:,}",
        "total GiB": total(report),
        "model MFLOP a token": f"{report.model_flops / report.tokens / 1e6:,.0f}",
        "program MFLOP a token": f"{flops_per_token(report) / 1e6:,.0f}",
        "HBM KB a token": f"{hbm * a_token / 1e3:,.0f}",
        "sent KB a token": f"{sent * a_token / 1e3:,.1f}",
        "of these along context": f"{along_time * a_token / 1e3:,.1f}",
        "compile s": f"{report.compile_seconds:.0f}",
    }  # fmt: skip


def shape(report: Report) -> Row:
    mesh = " ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    return {"chips": f"{report.num_devices:,}", "topology": report.topology, "mesh": mesh or "one device"}


def total(report: Report) -> str:
    return f"{report.needed_bytes / GIB:.2f}" + ("" if report.fits else ", too much")


def flops_per_token(report: Report) -> float:
    return sum(cost.flops for cost in report.costs.values()) * report.num_devices / report.tokens


def moved(report: Report, key: Callable[..., str]) -> str:
    sums: dict[str, int] = defaultdict(int)
    for c in report.collectives:
        sums[key(c)] += c.runs * c.bytes
    return ", ".join(f"{name} {size / GB:.3f}" for name, size in sorted(sums.items(), key=lambda item: -item[1]))


def over_chips(args: argparse.Namespace, config: Config) -> Iterator[Case]:
    for chips, name in zip(CHIPS, SLICES[args.kind], strict=True):
        if chips in args.chips:
            where = topology(name)
            batch = args.rows * chips if args.table == "weak" else args.batch
            yield laid_out(config, where, batch, args.length), where


def over_lengths(args: argparse.Namespace, config: Config) -> Iterator[Case]:
    where = topology(args.topology)
    for length in args.lengths:
        yield laid_out(config, where, args.tokens // length, length), where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("weak", "strong", "sequence"))
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--layers", type=int, help="of the stack, instead of the recipe's")
    parser.add_argument("--kind", choices=SLICES, default="v5e", help="of chip (weak, strong)")
    parser.add_argument("--chips", type=int, nargs="+", choices=CHIPS, default=CHIPS)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (weak, strong)")
    parser.add_argument("--rows", type=int, default=4, help="sequences of a chip (weak)")
    parser.add_argument("--batch", type=int, default=256, help="sequences of a step (strong)")
    parser.add_argument("--topology", default="v5p:4x4x4", help="(sequence)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=2**20, help="of a step (sequence)")
    args = parser.parse_args()
    prepare_process(topology(args.topology))
    cases, row_of = (over_lengths, by_length) if args.table == "sequence" else (over_chips, by_chips)
    for recipe in args.recipes:
        config = with_layers(load_config(recipe), args.layers)
        print(f"\n{args.table} scaling of {recipe}, {config.model.num_layers} layers\n")
        for n, case in enumerate(cases(args, config)):
            row = row_of(report_of(case))
            if n == 0:
                print(f"| {' | '.join(row)} |\n|{' --- |' * len(row)}")
            print(f"| {' | '.join(row.values())} |", flush=True)


if __name__ == "__main__":
    main()
