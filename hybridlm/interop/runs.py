"""`hybridlm import` and `hybridlm export`: published checkpoints to runs, and runs to published checkpoints."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm import config_io
from hybridlm.config import Config, Data, Model
from hybridlm.config_check import ConfigError
from hybridlm.data.tokenizers import load_tokenizer
from hybridlm.distributed import together
from hybridlm.interop.architecture import Architecture
from hybridlm.interop.canonical import differences
from hybridlm.interop.families import ARCHITECTURES, architecture_named, architecture_of
from hybridlm.interop.fields import CONFIG, Fields, check_not_quantized, read_fields
from hybridlm.interop.safetensors import DTYPES, SINGLE, Planned, Tensors, write_model
from hybridlm.interop.weights import check_tensors, read_params, shapes_of, with_offset, written
from hybridlm.model import Params
from hybridlm.model.by_layer import by_name
from hybridlm.train import derived
from hybridlm.train import directory as run_directory
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.mesh_choice import run_mesh

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""In order of preference."""
COMPANIONS = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that travel with the weights, there and back."""
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_BYTES = 5_000_000_000
"""Of a file of tensors at most; that is also what transformers writes."""
MISSING = "(none)"


def read_model(hf_dir: Path) -> tuple[Architecture, Model]:
    """What the config.json of a published model says. Raises ConfigError where it is not supported."""
    fields = read_fields(hf_dir)
    path = hf_dir / CONFIG
    try:
        architecture = architecture_of(fields)
        check_not_quantized(fields)
        return architecture, architecture.to_model(fields)
    except ConfigError as error:
        raise config_io.FileError(f"{path}: {error.path}", error.message) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise config_io.FileError(str(path), f": has a field of a wrong type or size: {error}") from None


def import_config(hf_dir: Path, overrides: Sequence[str] = ()) -> tuple[Architecture, Config]:
    """A run's config for a published model: its `model`, its tokenizer, and defaults with `overrides`."""
    architecture, model = read_model(hf_dir)
    tokenizer = next((str(hf_dir / name) for name in TOKENIZERS if (hf_dir / name).is_file()), MISSING)
    config = config_io.override(Config(model=model, data=Data(tokenizer=tokenizer)), overrides)
    if config.data.tokenizer == MISSING:
        raise ConfigError(
            str(hf_dir), f": holds no {' or '.join(TOKENIZERS)}; give --data.tokenizer=FILE, or byte for bytes"
        )
    return architecture, config


def load_pretrained(hf_dir: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Params]:
    """Config and parameters of a published model, on the mesh of the config, without a run.

    Raises ConfigError where the user's input is wrong.
    """
    hf_dir = Path(hf_dir)
    architecture, config = import_config(hf_dir, overrides)
    return config, read_params(Tensors(hf_dir), architecture, config.model, config.kernels, run_mesh(config))


def import_run(hf_dir: str | Path, out: str | Path, overrides: Sequence[str] = ()) -> Config:
    """`hybridlm import`: a run at `out`, before its first step, of the published model in `hf_dir`.

    Raises ConfigError where the user's input is wrong; nothing is left at `out` then.
    """
    hf_dir, out = Path(hf_dir), Path(out)
    derived.check_free(out)
    together("the directory is free")  # before the first begins to write beside it
    architecture, config = import_config(hf_dir, overrides)
    tensors = Tensors(hf_dir)
    check_tensors(tensors, architecture, config.model, config.kernels, run_mesh(config))
    mesh, corpus = derived.prepared(config)
    params = read_params(tensors, architecture, config.model, config.kernels, mesh)
    kept = [n for r in architecture.rules(config.model, tensors.entries) if not r.exact for n in r.theirs]

    def bring_along(directory: Path) -> None:
        companions = directory / config_io.PRETRAINED
        companions.mkdir()
        for name in (CONFIG, *COMPANIONS):
            if (hf_dir / name).is_file():
                shutil.copyfile(hf_dir / name, companions / name)
        if kept:
            planned = [Planned(name, *tensors.entries[name][1:3]) for name in kept]
            write_model(companions, planned, map(tensors.read, kept), shard_bytes=SHARD_BYTES)

    tokenizer = Path(config.data.tokenizer)
    if tokenizer.parent == hf_dir and tokenizer.name in COMPANIONS:
        own = str(out / config_io.PRETRAINED / tokenizer.name)
        config = replace(config, data=replace(config.data, tokenizer=own))
    origin = {"command": "import", "run": str(hf_dir), "step": None, "architecture": architecture.name}
    derived.write_run(config, out, params, corpus, mesh, origin | _dtypes(tensors), bring_along)
    return config


def _dtypes(tensors: Tensors) -> dict[str, Any]:
    """That of most tensors, and those of the others."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    found = {name: codes[entry.dtype] for name, entry in tensors.entries.items()}
    (most, _), *_ = Counter(found.values()).most_common(1)
    return {"dtype": most, "other_dtypes": {name: code for name, code in found.items() if code != most}}


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    architecture: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """`hybridlm export`: the latest checkpoint of a run as a published model in `out`; returns the architecture.

    Without `architecture` it is the one that the run was imported from, or the first that holds the model. `dtype` is
    that of the tensors; where it is absent an import that was not trained is written as it was, all else in float32.
    The host holds the parameters of one tensor at a time, or where there are adapters all.

    Raises ConfigError where no architecture holds the model, or the user's input is wrong otherwise.
    """
    run, out = Path(run), Path(out)
    config = config_io.load_run_config(run)
    derived.check_free(out)
    origin = run_directory.origin_of(run) or {}
    found, fields = find_architecture(config.model, architecture, origin.get("architecture"))
    abstract = derived.abstract_params(config)
    shapes = {name: x.shape for name, x in by_name(abstract, config.model).items()}
    rules = found.rules(config.model, ())
    companions = run / config_io.PRETRAINED
    kept = Tensors(companions) if (companions / SINGLE).is_file() else None

    def kept_tensor(name: str) -> np.ndarray | None:
        return None if kept is None or name not in kept.entries else kept.read(name)

    with Checkpoints(run / "checkpoints", config.model, config.checkpoint) as checkpoints:
        stored, step = checkpoints.reader_of_params(abstract), checkpoints.latest_step()
        add_offset = config.model.norm_offset and not found.to_model(Fields(fields)).norm_offset
        read = (lambda name: with_offset(name, stored(name))) if add_offset else stored
        as_it_was = dtype is None and step == 0 and origin.get("architecture") == found.name
        most = origin["dtype"] if as_it_was else NAMES[dtype or "float32"]
        others = origin["other_dtypes"] if as_it_was else {}
        planned = [
            Planned(name, DTYPES[others.get(name, most)], shape)
            for rule in rules
            for name, shape in zip(rule.theirs, shapes_of(rule, [shapes[n] for n in rule.ours]), strict=True)
        ]
        partial = derived.partial_of(out)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"--out {out}", f": cannot be written to: {error.strerror}") from None
        try:
            write_model(partial, planned, written(rules, read, kept_tensor), shard_bytes=shard_bytes)
            is_same = origin.get("architecture") == found.name
            described = _described(config, companions if is_same else None, found, fields, most)
            (partial / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            _copy_companions(config, companions, partial)
            os.replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return found.name


def find_architecture(
    model: Model, name: str | None, preferred: str | None = None
) -> tuple[Architecture, dict[str, Any]]:
    """An architecture that computes what `model` does, and its fields of config.json.

    That of `name`, or of all the first that does, beginning with `preferred`. One whose norms have no offset takes a
    model's that have (see `with_offset`). Raises ConfigError where none does.
    """
    if name is not None:
        candidates = [architecture_named(name, "--architecture")]
    else:
        candidates = sorted(ARCHITECTURES.values(), key=lambda known: known.name != preferred)
    closest: tuple[int, str] | None = None
    for candidate in candidates:
        try:
            fields = candidate.to_fields(model)
            target = candidate.to_model(Fields(fields))
            lines = differences(replace(model, norm_offset=model.norm_offset and target.norm_offset), target)
        except ConfigError as error:
            if name is not None:
                raise ConfigError("model", f": is no {candidate.name}: {error}") from None
            continue
        if not lines:
            return candidate, fields
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        if closest is None or len(lines) < closest[0]:
            closest = len(lines), f"; the closest is {candidate.name}, with {'; '.join(lines[:3])}{more}"
    among = "it" if name is not None else ", ".join(ARCHITECTURES)
    raise ConfigError("model", f": is not what {among} computes{closest[1] if closest else ''}")


def _described(
    config: Config, companions: Path | None, architecture: Architecture, fields: dict[str, Any], code: str
) -> dict[str, Any]:
    """config.json: what came with the weights, if anything, and over it what the model is now."""
    dtype = next(name for name, known in NAMES.items() if known == code)
    own = {"architectures": [architecture.name], "model_type": architecture.model_type, "torch_dtype": dtype, **fields}
    if companions is not None and (companions / CONFIG).is_file():
        before = read_fields(companions).values
        return {name: value for name, value in before.items() if name != "dtype"} | own
    tokenizer = load_tokenizer(config.data.tokenizer)
    return {
        "bos_token_id": tokenizer.begin_id,
        "eos_token_id": tokenizer.end_id,
        "max_position_embeddings": config.data.seq_len,
        **own,
    }


def _copy_companions(config: Config, companions: Path, out: Path) -> None:
    """What came with the weights, and the run's tokenizer where that is another."""
    for name in COMPANIONS:
        if (companions / name).is_file():
            shutil.copyfile(companions / name, out / name)
    tokenizer = Path(config.data.tokenizer)
    if config.data.tokenizer == "byte" or tokenizer.parent == companions:
        return
    shutil.copyfile(tokenizer, out / f"tokenizer{tokenizer.suffix}")
    beside = tokenizer.with_name("tokenizer_config.json")
    if beside.is_file():
        shutil.copyfile(beside, out / beside.name)
