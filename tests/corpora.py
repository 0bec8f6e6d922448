"""Text that a tiny model learns quickly."""

from pathlib import Path

import numpy as np


def write_corpus(directory: Path, files: int, sentences: int) -> Path:
    """Text files of uneven lengths, the first of so many sentences. Returns the directory, which is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    words = np.random.default_rng(0)
    for i in range(files):
        text = words.choice(["the cat sat. ", "a dog ran. ", "one bird sang. "], size=sentences + 7 * i)
        (directory / f"{i}.txt").write_text("".join(text))
    return directory
