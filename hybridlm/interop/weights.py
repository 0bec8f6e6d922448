"""Parameters from the tensors of a published checkpoint, placed on a mesh one after another."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from hybridlm.config import Kernels, Model
from hybridlm.config_check import ConfigError
from hybridlm.interop.architecture import Architecture
from hybridlm.interop.rules import Rule, Shape
from hybridlm.interop.safetensors import Tensors
from hybridlm.model import Params, build
from hybridlm.train import layout
from hybridlm.train.checkpoint import abstract_state

HEAD = "lm_head.weight"
SHOWN = 8
"""Names of tensors in an error."""
NEVER_READ = ("rotary_emb.inv_freq",)
"""What some checkpoints hold beside weights, by the ends of names."""


def read_params(
    tensors: Tensors, architecture: Architecture, model: Model, kernels: Kernels, mesh: jax.sharding.Mesh
) -> Params:
    """The parameters of `model` in float32, laid out over `mesh`.

    The host holds one rule's tensors at a time: mostly one, of experts a layer's. Rules of the same parameters in other
    layers come one after another, so that devices hold, beside the parameters, the layers of one stack once more.

    Raises ConfigError where tensors are missing, too many, of another shape, or not of floating-point numbers.
    """
    with jax.set_mesh(mesh):
        abstract = _described(model, kernels, mesh)
        wanted = layout.flat_abstract(abstract, model)
        rules = architecture.rules(model, tensors.entries)
        _check(tensors, architecture, model, rules, wanted)
        leaves = layout.leaves_of(abstract, model)
        number = {name: i for i, leaf in enumerate(leaves) for name in leaf.names}
        arrays: dict[str, jax.Array] = {}
        whole: dict[int, jax.Array] = {}
        for rule in sorted(rules, key=lambda rule: min(number[name] for name in rule.ours)):
            shapes = [wanted[name].shape for name in rule.ours]
            read = (_float32(tensors, name) for name in rule.theirs)
            for name, value in zip(rule.ours, rule.to_ours(read, shapes), strict=True):
                arrays[name] = _placed(value, wanted[name])
            for i in sorted({number[name] for name in rule.ours}):
                if all(name in arrays for name in leaves[i].names):
                    whole[i] = layout.assembled(leaves[i], arrays)
        return jax.tree.unflatten(jax.tree.structure(abstract), [whole[i] for i in range(len(leaves))])


def _float32(tensors: Tensors, name: str) -> np.ndarray:
    return tensors.read(name).astype(np.float32)


def _placed(value: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """On the devices of this process, each of which takes its part."""
    array = jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])  # pyright: ignore
    return array.block_until_ready()


def shapes_of(rule: Rule, shapes: Sequence[Shape]) -> list[Shape]:
    """Those of a rule's tensors, for those of our parameters."""
    ours = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    return [tensor.shape for tensor in jax.eval_shape(rule.to_theirs, ours)]


def check_tensors(
    tensors: Tensors, architecture: Architecture, model: Model, kernels: Kernels, mesh: jax.sharding.Mesh
) -> None:
    """Raise ConfigError where `read_params` would, without reading any."""
    with jax.set_mesh(mesh):
        wanted = layout.flat_abstract(_described(model, kernels, mesh), model)
        _check(tensors, architecture, model, architecture.rules(model, tensors.entries), wanted)


def _described(model: Model, kernels: Kernels, mesh: jax.sharding.Mesh) -> Params:
    init, _ = build(model, kernels)
    return abstract_state(lambda: init(jax.random.key(0)), mesh)


def _check(
    tensors: Tensors, architecture: Architecture, model: Model, rules: Sequence[Rule], wanted: dict[str, Any]
) -> None:
    assert {name for rule in rules for name in rule.ours} == wanted.keys()
    entries, where = tensors.entries, str(tensors.directory)
    needed = [name for rule in rules for name in rule.theirs]
    _refuse(where, "lacks", [name for name in needed if name not in entries])
    unread = entries.keys() - set(needed)
    _refuse(where, "has, beside what the model reads,", sorted(unread - _beside(unread, architecture, model)))
    wrong = []
    for rule in rules:
        for name, shape in zip(rule.theirs, shapes_of(rule, [wanted[ours].shape for ours in rule.ours]), strict=True):
            found = entries[name]
            if found.shape != shape:
                wrong.append(f"{name} of shape {list(found.shape)}, not {list(shape)}")
            elif found.dtype.itemsize > 4 or found.dtype.kind in "iub":
                wrong.append(f"{name} of {found.dtype}, which is not float32, float16 or bfloat16")
    _refuse(where, "holds", wrong)
    _check_tied(tensors, model, rules)


def _check_tied(tensors: Tensors, model: Model, rules: Sequence[Rule]) -> None:
    """Raise ConfigError where a model whose head is its embedding has another head; transformers takes the latter."""
    if not model.tied_embedding or HEAD not in tensors.entries:
        return
    embedding = next(rule.theirs[0] for rule in rules if rule.ours == ("embedding",))
    if not tensors.are_equal(HEAD, embedding):
        raise ConfigError(
            str(tensors.directory),
            f": says tie_word_embeddings, and {HEAD} is not {embedding}; set it to false in config.json, or leave "
            f"{HEAD} out",
        )


def _beside(names: Collection[str], architecture: Architecture, model: Model) -> set[str]:
    """Tensors that nothing is lost with."""

    def is_beside(name: str) -> bool:
        is_copy = model.tied_embedding and name == HEAD
        return is_copy or name.endswith(NEVER_READ) or not architecture.is_read(name)

    return set(filter(is_beside, names))


def _refuse(where: str, verb: str, names: Sequence[str]) -> None:
    if names:
        more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise ConfigError(where, f": {verb} {', '.join(names[:SHOWN])}{more}")


def with_offset(name: str, array: np.ndarray) -> np.ndarray:
    """A parameter, with 1 + scale in place of a scale that `config.Model.norm_offset` is about: what norms multiply by.

    They are the numbers that a norm with an offset computes, so that nothing is rounded once more.
    """
    *above, module, leaf = ["", "", *name.split(".")]
    is_last = module == "norm" and not any(above)
    has_offset = leaf == "scale" and (is_last or module in ("mixer_norm", "ffn_norm", "q_norm", "k_norm"))
    return np.float32(1) + array if has_offset else array


def written(
    rules: Iterable[Rule], read: Callable[[str], np.ndarray], kept: Callable[[str], np.ndarray | None]
) -> Iterable[np.ndarray]:
    """The rules' tensors, one after another, of the parameters that `read(name)` gives.

    `kept(name)` is a tensor as it was imported, where it was kept, else None. It is given back where it still stands
    for the same parameters, bit for bit.
    """
    for rule in rules:
        ours = [read(name) for name in rule.ours]
        before = None if rule.exact else [kept(name) for name in rule.theirs]
        if before is not None and all(tensor is not None for tensor in before):
            found = rule.to_ours(before, [x.shape for x in ours])  # pyright: ignore[reportArgumentType]
            if all(x.tobytes() == y.tobytes() for x, y in zip(found, ours, strict=True)):
                yield from before  # pyright: ignore[reportReturnType]
                continue
        yield from rule.to_theirs(ours)
