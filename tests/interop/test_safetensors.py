"""Files of tensors against the library that defines them, and files that are none."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hybridlm.config_check import ConfigError
from hybridlm.interop.safetensors import INDEX, SINGLE, Planned, Tensors, write_model

safetensors = pytest.importorskip("safetensors.numpy")


def some_tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0).standard_normal
    return {
        "a.weight": draw((5, 3)).astype(np.float32),
        "b.weight": draw((7,)).astype(np.float16),
        "c": draw((2, 3, 4)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def write(directory: Path, tensors: dict[str, np.ndarray], shard_bytes: int = 10**9) -> list[Path]:
    planned = [Planned(name, x.dtype, x.shape) for name, x in tensors.items()]
    return write_model(directory, planned, tensors.values(), shard_bytes=shard_bytes)


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    wanted = some_tensors()
    safetensors.save_file(wanted, tmp_path / SINGLE, metadata={"format": "pt"})
    read = Tensors(tmp_path)
    assert read.entries.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(read.read(name), tensor, strict=True)


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    wanted = some_tensors()
    write(tmp_path, wanted)
    found = safetensors.load_file(tmp_path / SINGLE)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor, strict=True)


def test_files_are_cut_at_the_size_that_is_asked_for(tmp_path: Path) -> None:
    wanted = {f"t{i}": np.full((10,), i, np.float32) for i in range(5)}
    files = write(tmp_path, wanted, shard_bytes=80)
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 200}
    assert {name: safetensors.load_file(tmp_path / file)[name][0] for name, file in index["weight_map"].items()} == {
        f"t{i}": i for i in range(5)
    }
    read = Tensors(tmp_path)
    assert all((read.read(name) == tensor).all() for name, tensor in wanted.items())


def test_values_beyond_the_range_are_refused(tmp_path: Path) -> None:
    planned = [Planned("w", np.dtype(np.float16), (2,))]
    write_model(tmp_path, planned, [np.array([6e4, np.inf], np.float32)], shard_bytes=100)  # as it was
    with pytest.raises(ConfigError, match=r"the largest value of w is 7e\+04, and that of float16 6.55e\+04"):
        write_model(tmp_path, planned, [np.array([7e4, np.inf], np.float32)], shard_bytes=100)


def header(text: str, rest: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + rest


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        (b"", "is not a safetensors file, or was cut short"),
        (b"PK\x03\x04" + b"\xff" * 60, "is not a safetensors file, or was cut short"),
        (header("not JSON"), "its header cannot be read"),
        (header("[]"), "its header cannot be read"),
        (
            header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}', b"0" * 9),
            "its header cannot be read",
        ),
        (header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"0" * 7), "ends before a does"),
        (
            header('{"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}', b"00"),
            "holds tensors of F8_E4M3",
        ),
    ],
    ids=["empty", "zip", "text", "list", "size", "cut", "dtype"],
)
def test_what_is_no_such_file_is_refused(contents: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(contents)
    with pytest.raises(ConfigError, match=problem):
        Tensors(tmp_path)


def test_a_missing_file_of_an_index_is_named(tmp_path: Path) -> None:
    for file in write(tmp_path, {f"t{i}": np.zeros(10, np.float32) for i in range(4)}, shard_bytes=80)[1:]:
        file.unlink()
    with pytest.raises(ConfigError, match="model-00002-of-00002.safetensors: is named by .* and is not there"):
        Tensors(tmp_path)


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path, {"t": np.zeros(10, np.float32)})
    index = {"weight_map": {"t": f"../{SINGLE}"}}
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="lies outside the directory"):
        Tensors(tmp_path / "model")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(
        ConfigError, match="holds no model.safetensors.*pytorch_model.bin is pickled, which is not read"
    ):
        Tensors(tmp_path)
