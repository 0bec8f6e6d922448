"""Judges the implementations of one operation.

    python -m hybridlm_kernels.bench linear_scan                                  # on the device at hand
    python -m hybridlm_kernels.bench rg_lru --device static-tpu:v5e --shape 1,8192,2560

On a device, each implementation is compared with a float64 oracle and then timed. `static-tpu:CHIP` compiles for a chip
that need not be there and reads the cost from the compiler's schedule. Results are appended to a JSONL file, which
`python -m hybridlm_kernels.bench.record FILE` prints as a table.
"""

import argparse
import difflib
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from hybridlm_kernels.bench.chips import CHIPS

PLATFORMS = ("cpu", "gpu", "tpu")
DEVICES = (*PLATFORMS, *(f"static-tpu:{chip}" for chip in CHIPS), "static-gpu:h200")


class UsageError(ValueError):
    """The command line asks for what does not exist or cannot be done here; the message is one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(words: Sequence[str] | None = None) -> int:
    """0; 1 when an implementation is wrong or does not compile; 2 for a wrong command line; 130 after Ctrl-C."""
    try:
        return run(parse(words))
    except UsageError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bench: --out: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted; the rows printed so far are in the file", file=sys.stderr)
        return 130


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("op", metavar="OP", help="linear_scan, rg_lru, short_conv, gated_linear_attention, ...")
    parser.add_argument("--device", metavar="DEVICE", help=f"{', '.join(DEVICES)}; the one at hand unless given")
    parser.add_argument(
        "--shape",
        nargs="+",
        type=shape,
        metavar="B,T,D",
        help="batch, time, channels; B,T,H,K,V of what has heads: key and value dims; M,K,N,G of grouped_matmul: rows, "
        "inputs, outputs, groups",
    )
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help="bfloat16, float32; both unless given")
    parser.add_argument("--impl", nargs="+", metavar="IMPL", help="all that run on the device unless given")
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument("--forward", action="store_true", help="the forward pass alone")
    passes.add_argument("--backward", action="store_true", help="forward with gradient alone; both unless given")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="default: kernels/benchmarks/results.jsonl of a checkout"
    )
    args = parser.parse_args(words)
    if args.device is not None:
        one_of("--device", args.device, DEVICES)
    return args


def shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be positive numbers, as in 1,8192,2560")
    return tuple(map(int, parts))


def one_of(what: str, word: str, known: Iterable[str]) -> None:
    known = list(known)
    if word not in known:
        close = difflib.get_close_matches(word, known, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"{what}: {word!r} must be one of {', '.join(known)}{meant}")


def run(args: argparse.Namespace) -> int:
    from hybridlm_kernels.bench import cases, judge, record

    one_of("OP", args.op, cases.CASES)
    case = cases.CASES[args.op]
    for dtype in args.dtype or ():
        one_of("--dtype", dtype, cases.DTYPES)
    for impl in args.impl or ():
        one_of("--impl", impl, case.implementations())
    for shape in args.shape or ():
        if len(shape) != case.dims.count(",") + 1:
            raise UsageError(f"--shape: {','.join(map(str, shape))!r} must be {case.dims} for {case.op}")
    passes = [cases.FORWARD] * (not args.backward) + [cases.BOTH] * (not args.forward)
    kind, _, model = (args.device or "").partition(":")
    path, made, count = args.out or record.default_file(), record.provenance(), 0
    try:
        if kind == "static-tpu":
            judging = judge.OnAbsentTpu(case, args.impl, CHIPS[model])
        elif kind == "static-gpu":
            judging = judge.OnAbsentGpu(case, args.impl, model)
        else:
            judging = judge.OnDevice(case, args.impl, kind or None)
        settings = itertools.product(args.shape or judging.shapes, args.dtype or cases.DTYPES)
        for row, line in judging.rows(list(settings), passes):
            print(line, flush=True)
            if path is not None:
                record.append(path, [row | made])
            count += 1
    except judge.Impossible as error:
        raise UsageError(str(error)) from None
    except judge.WrongKernel as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if path is not None:
        print(f"{count} rows appended to {path}")
    return judging.status


if __name__ == "__main__":
    sys.exit(main())
