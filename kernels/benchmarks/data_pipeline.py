"""Tokens per second of the data pipeline, by where tokens lie, packing and worker processes, beside a plain reader.

    PYTHONPATH=.:kernels python kernels/benchmarks/data_pipeline.py [--text DIR]

The text is Python's standard library where no directory is given; the subword tokenizer is trained on it. A rate is the
best of several rounds, which other programs on the machine disturb least; the first round is left out, and the seconds
until the first batch are told on their own. The CPU time is that of the training process, its threads included and its
workers not, for a million tokens. All batches end as arrays of JAX's default device.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybridlm import cli
from hybridlm.config import Data
from hybridlm.data.corpus import load_corpus
from hybridlm.data.pipeline import Batches
from hybridlm.data.sources import read_documents

BATCH, SEQ_LEN, VOCAB = 16, 1024, 8192
ROUNDS, ROUND = 6, 24
"""So many rounds of so many batches."""


def train_tokenizer(data: Data, directory: Path) -> Path:
    """A byte-level BPE of some megabytes of the text."""
    import tokenizers

    tokenizer: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [document.text.decode(errors="replace") for document in read_documents(data)[:200]]
    tokenizer.train_from_iterator(texts, trainer)
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def prepare(data: Data, directory: Path) -> Data:
    """The same text as shards."""
    words = ["prepare", data.path or "python-stdlib", "--out", str(directory), "--tokenizer", data.tokenizer]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main(words)
    return replace(data, source="prepared", path=str(directory))


def plain(data: Data, directory: Path) -> Iterator[dict[str, jax.Array]]:
    """Inputs and targets at random places of one mapped file: nothing is packed, and nothing kept in order."""
    stream = load_corpus(data).train.sources[0].windows.stream
    path = directory / "tokens.npy"
    np.save(path, stream.read(0, stream.num_targets)[0])
    tokens, rng = np.load(path, mmap_mode="r"), np.random.default_rng(0)
    while True:
        begins = rng.integers(0, len(tokens) - SEQ_LEN - 1, BATCH)
        rows = np.stack([tokens[begin : begin + SEQ_LEN + 1].astype(np.int32) for begin in begins])
        yield jax.device_put({"tokens": rows[:, :-1], "targets": rows[:, 1:]})


def measure(name: str, batches: Callable[[], Iterator[Any]]) -> None:
    """Print millions of tokens per second, CPU milliseconds for a million, and the seconds before the first batch."""
    started = time.perf_counter()
    iterator = batches()
    jax.block_until_ready(next(iterator))
    first = time.perf_counter() - started
    rates, used = [], []
    for _ in range(ROUNDS):
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(ROUND):
            jax.block_until_ready(next(iterator))
        tokens = ROUND * BATCH * SEQ_LEN / 1e6
        rates.append(tokens / (time.perf_counter() - started))
        used.append(1e3 * (time.process_time() - cpu) / tokens)
    print(f"{name:46s} {max(rates[1:]):10.1f} {min(used[1:]):14.0f} {first:12.2f}", flush=True)
    if isinstance(iterator, Batches):
        iterator.close()


def pipeline(data: Data) -> Callable[[], Batches]:
    mixture = load_corpus(data).train
    return lambda: Batches(mixture, batch_size=BATCH, seed=0, sharding=None, prefetch=4, workers=data.workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", help="file or directory")
    args = parser.parse_args()
    text = Data(seq_len=SEQ_LEN) if args.text is None else Data(seq_len=SEQ_LEN, source="text", path=args.text)
    print(f"{os.cpu_count()} CPUs, {jax.devices()[0].device_kind}, batches of {BATCH} x {SEQ_LEN} tokens")
    print(f"{'':46s} {'M tok/s':>10s} {'CPU ms/M tok':>14s} {'1st batch s':>12s}")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for kind in ("byte", "bpe"):
            data = text if kind == "byte" else replace(text, tokenizer=str(train_tokenizer(text, root)))
            measure(f"{kind}: plain reader of a mapped file", lambda data=data: plain(data, root))
            prepared = prepare(data, root / kind)
            for where, stored in (("memory", data), ("prepared", prepared)):
                for packing in ("concatenate", "first-fit"):
                    for workers in (0, 1, 2):
                        chosen = replace(stored, packing=packing, workers=workers)
                        measure(f"{kind}: {where}, {packing}, workers={workers}", pipeline(chosen))


if __name__ == "__main__":
    main()
