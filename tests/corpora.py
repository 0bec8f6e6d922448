"""Text that a tiny model learns quickly."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_corpus(directory: Path, files: int, sentences: int) -> Path:
    """Text files of uneven lengths, the first of so many sentences. Returns the directory, which is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    words = np.random.default_rng(0)
    for i in range(files):
        text = words.choice(["the cat sat. ", "a dog ran. ", "one bird sang. "], size=sentences + 7 * i)
        (directory / f"{i}.txt").write_text("".join(text))
    return directory


def write_tfds(directory: Path, splits: Mapping[str, Sequence[str]]) -> str:
    """A dataset of texts below `directory`. Returns `tfds:` and its name."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():  # as people have datasets whose builders are not there

        class HybridlmTestText(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {split: self._generate_examples(rows) for split, rows in splits.items()}

            def _generate_examples(self, rows: Sequence[str]) -> Any:
                yield from ((i, {"text": row}) for i, row in enumerate(rows))

    HybridlmTestText(data_dir=directory, file_format="array_record").download_and_prepare()
    return "tfds:hybridlm_test_text:1.0.0"
