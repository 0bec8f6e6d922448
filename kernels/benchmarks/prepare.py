"""Times `hybridlm prepare` by tokenizer and workers, and reading what it wrote beside a memory-mapped array.

    python kernels/benchmarks/prepare.py corpus.jsonl --tokenizers byte tokenizer.json --workers 1 2

Preparing is timed as a process from its start to its end. Reading takes windows of --seq-len tokens and one more, with
the bytes they stand for and where documents start: in random order, then in order, per second of CPU time. The memory
map holds tokens and bytes alone and knows of no documents. The best of --repeats is printed. The memory is the peak of
the process that was started, in which one worker works.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from hybridlm.data.shards import PreparedStream

Read = Callable[[int, int], object]


def prepare(
    corpus: Path, out: Path, tokenizer: str, workers: int, shard_megabytes: float
) -> tuple[float, float, float]:
    """Seconds, seconds of CPU time over all processes, and megabytes of the first process at its peak."""
    begun, used = time.perf_counter(), cpu_seconds()
    command = [sys.executable, "-m", "hybridlm.cli", "prepare", str(corpus), f"--out={out}", f"--tokenizer={tokenizer}"]
    command += [f"--workers={workers}", f"--shard-size={shard_megabytes}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - begun, cpu_seconds() - used, usage.ru_maxrss / 1e3


def cpu_seconds() -> float:
    """Of the processes that were started from here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def mapped(stream: PreparedStream, directory: Path) -> Read:
    """Reads the same tokens from memory-mapped files."""
    tokens, num_bytes, _ = stream.read(0, stream.num_targets + 1)
    np.save(directory / "tokens.npy", tokens)
    np.save(directory / "num_bytes.npy", num_bytes)
    arrays = [np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("tokens", "num_bytes")]
    return lambda begin, end: [np.array(array[begin:end]) for array in arrays]


def rate(read: Read, begins: Iterable[int], seq_len: int, repeats: int) -> float:
    """Tokens per second of CPU time: what is read lies in the page cache."""
    best, count = float("inf"), 0
    for _ in range(repeats):
        begun, count = time.process_time(), 0
        for begin in begins:
            read(begin, begin + seq_len + 1)
            count += seq_len
        best = min(best, time.process_time() - begun)
    return count / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizers", nargs="+", default=["byte"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shard-size", type=float, default=8, metavar="MB")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for tokenizer in args.tokenizers:
        with tempfile.TemporaryDirectory() as directory:
            for workers in args.workers:
                outs = [Path(directory, f"{workers}-{i}") for i in range(args.repeats)]
                seconds, used, memory = min(
                    prepare(args.corpus, out, tokenizer, workers, args.shard_size) for out in outs
                )
                total = PreparedStream(outs[0], "train").manifest.totals().values()
                tokens, text = sum(t["tokens"] for t in total), sum(t["text_bytes"] for t in total)
                print(
                    f"prepare {tokenizer}, {workers} workers: {tokens / seconds / 1e6:6.2f} M tokens/s, "
                    f"{text / seconds / 1e6:6.2f} MB/s of text, {seconds:.1f} s ({used:.1f} s of CPU time), "
                    f"{memory:.1f} MB of memory",
                    flush=True,
                )
            stream = PreparedStream(Path(directory, f"{args.workers[0]}-0"), "train")
            last = stream.num_targets - args.seq_len - 1
            in_order = range(0, last, args.seq_len)[: args.windows]
            anywhere = np.random.default_rng(0).integers(0, last, len(in_order)).tolist()
            for name, read in (("PreparedStream", stream.read), ("np.memmap", mapped(stream, Path(directory)))):
                rates = [rate(read, begins, args.seq_len, args.repeats) for begins in (anywhere, in_order)]
                at_random, in_turn = (f"{value / 1e6:.1f} M tokens/s" for value in rates)
                print(f"read {tokenizer}, {name}: {at_random} at random, {in_turn} in order", flush=True)


if __name__ == "__main__":
    main()
