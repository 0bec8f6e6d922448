"""Tiny subword tokenizers, trained once, and a corpus on disk."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

SAMPLES = [
    "def add(x, y):\n    return x + y\n",
    "The quick brown fox jumps over the lazy dog. Ünïcode, “quotes” and ½ a line.\n",
    "日本語のテスト 🙂 naïve café\n",
]


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer.json with the special token <|endoftext|>."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=311,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLES * 20, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model with byte fallback and the package's default (lossy) normalisation."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLES * 20),
        model_writer=model,
        vocab_size=353,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tiny.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(params=["bpe_file", "sentencepiece_file"])
def subword_file(request: pytest.FixtureRequest) -> Path:
    """Each of the subword tokenizers in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def write_files(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Writes files by relative name below a fresh directory, and gives that directory."""

    def write(files: dict[str, bytes]) -> Path:
        root = tmp_path / "corpus"
        for name, contents in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents)
        return root

    return write
