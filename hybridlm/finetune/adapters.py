"""Low-rank adapters: matrices whose changes alone are trained.

LoRA (Hu et al., 2021, arXiv:2106.09685, eq. 3): W' = W + (alpha / r) A B. DoRA (Liu et al., 2024, arXiv:2402.09353,
eq. 5): W' = m (W + (alpha / r) A B) / |W + (alpha / r) A B|, the norm over the inputs of each output, and m trained.

Adapters are the subtree `adapters` of the parameters, with `{"a", "b"}` (and `"m"`) where the model has W. A matrix is
added up where a layer reads it, inside the scan over layers: neither the sum nor its gradient is ever there for more
than one layer. Letters: i inputs, o outputs, r rank; B whatever has matrices of its own: layers, experts, blocks.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.finetune.paths import by_path, check_patterns, map_with_paths, matches
from hybridlm.model import Params

ADAPTERS = "adapters"
DEFAULT_TARGETS = ("stack.*.mixer.*", "stack.*.ffn.*")
NO_DEFAULT_TARGETS = ("*.router.*", "*.w_conv")


class Axes(NamedTuple):
    """How many of a matrix's last axes are inputs and outputs."""

    inputs: int
    outputs: int


SHAPES: dict[str, Axes] = {
    "w_o": Axes(2, 1),  # h v d
    **dict.fromkeys(("w_gate", "w_up", "w_down"), Axes(1, 1)),  # of experts: x d f
    **dict.fromkeys(("w_gate_a", "w_gate_x"), Axes(1, 1)),  # of the RG-LRU, in blocks: h i o
}
"""Of those with three axes; any other is d h k, outputs by heads."""


def axes_of(path: str, ndim: int) -> Axes | None:
    """Those of the parameter at `path`; None where it is no matrix.

    Matrices are called `w` or `w_...`, as what weight decay applies to is; scanned ones have an axis of layers before.
    """
    name = path.rpartition(".")[2]
    rank = ndim - path.startswith("stack.repeats.")
    if not (name == "w" or name.startswith("w_")) or rank not in (2, 3):
        return None
    return Axes(1, 1) if rank == 2 else SHAPES.get(name, Axes(1, 2))


def targets_of(lora: config.LoRA, params: Params) -> dict[str, Axes]:
    """Paths of the matrices that get adapters. Raises ConfigError where a pattern names none."""
    found = {path: axes_of(path, x.ndim) for path, x in by_path(base_of(params)).items()}
    matrices = {path: axes for path, axes in found.items() if axes is not None}
    if lora.targets:
        check_patterns("finetune.lora.targets", lora.targets, list(matrices))
        return {path: axes for path, axes in matrices.items() if matches(lora.targets, path)}
    targets = {
        path: axes
        for path, axes in matrices.items()
        if matches(DEFAULT_TARGETS, path) and not matches(NO_DEFAULT_TARGETS, path)
    }
    if not targets:
        raise ConfigError("finetune.lora.targets", ": mixers and FFNs of this model have no matrices; name some")
    return targets


def base_of(params: Params) -> Params:
    """The model's own parameters, without adapters."""
    return {name: part for name, part in params.items() if name != ADAPTERS}


def adapter_shapes(
    lora: config.LoRA, shape: tuple[int, ...], axes: Axes, entries: tuple[Any, ...] | None
) -> dict[str, tuple[tuple[int, ...], tuple[Any, ...] | None]]:
    """The shape of each array of an adapter, and its axes' mesh axes where those of the matrix, `entries`, are given.

    They are spread as the matrix is; the rank's axis is on every device.
    """

    def of(parts: tuple[Any, ...], rank: Any) -> dict[str, tuple[Any, ...]]:
        own, inputs, outputs = _split(parts, axes)
        of_m = {"m": (*own, *outputs)} if lora.dora else {}
        return {"a": (*own, *inputs, rank), "b": (*own, rank, *outputs)} | of_m

    specs = {} if entries is None else of(entries, None)
    return {name: (shape, specs.get(name)) for name, shape in of(shape, lora.rank).items()}


def new_adapters(lora: config.LoRA, params: Params, key: Key[Array, ""]) -> Params:
    """`params` with adapters that change nothing yet: A normal with variance 1 / i, B zero, m the norms of W."""
    leaves, targets = by_path(params), targets_of(lora, params)
    shapes = {
        path: adapter_shapes(lora, leaves[path].shape, axes, _entries(leaves[path])) for path, axes in targets.items()
    }
    sizes = [math.prod(of_path["a"][0]) for of_path in shapes.values()]
    # One draw for all: compiling as many as there are matrices takes minutes on a CPU.
    drawn = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1].tolist())

    def adapter(path: str, normal: Array) -> dict[str, Array]:
        w, axes, of_path = leaves[path], targets[path], shapes[path]
        (shape_a, spec_a), (shape_b, spec_b) = of_path["a"], of_path["b"]
        _, inputs, _ = _split(w.shape, axes)
        a = normal.reshape(shape_a) / math.sqrt(math.prod(inputs))
        made = {"a": _laid_out(a, spec_a), "b": _laid_out(jnp.zeros(shape_b), spec_b)}
        return made | ({"m": jnp.squeeze(norm_of(w, axes), _input_axes(w, axes))} if lora.dora else {})

    return params | {ADAPTERS: nested({path: adapter(path, x) for path, x in zip(targets, drawn, strict=True)})}


def merged(
    w: Float[Array, "..."], adapter: dict[str, Float[Array, "..."]], axes: Axes, scale: float
) -> Float[Array, "..."]:
    """W' in W's layout. As in DoRA's section 4.3, no gradient goes through the norm."""
    batch = w.ndim - sum(axes)
    letters = iter("abcdefghijklmnopq")
    own, into, out = ("".join(next(letters) for _ in range(n)) for n in (batch, axes.inputs, axes.outputs))
    change = jnp.einsum(
        f"{own}{into}r,{own}r{out}->{own}{into}{out}",
        adapter["a"],
        adapter["b"],
        out_sharding=None if jax.sharding.get_abstract_mesh().empty else PartitionSpec(*_entries(w)),
    )
    sum_ = w + scale * change
    if "m" not in adapter:
        return sum_
    magnitude = jnp.expand_dims(adapter["m"], _input_axes(w, axes))
    return sum_ * (magnitude / jax.lax.stop_gradient(norm_of(sum_, axes)))


def norm_of(w: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
    """The norm over the inputs of each output; their axes stay, with length 1."""
    return jnp.sqrt(jnp.sum(jnp.square(w), axis=_input_axes(w, axes), keepdims=True))


@jax.tree_util.register_pytree_node_class
class Adapted:
    """A matrix with its adapter in the place of a parameter: `self.w_q[...]` of a layer is their sum."""

    def __init__(self, w: Any, adapter: Any, axes: Axes, scale: float):
        self.w, self.adapter, self.axes, self.scale = w, adapter, axes, scale

    def __getitem__(self, index: Any) -> Float[Array, "..."]:
        return merged(self.w, self.adapter, self.axes, self.scale)[index]

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[Axes, float]]:
        return (self.w, self.adapter), (self.axes, self.scale)

    @classmethod
    def tree_unflatten(cls, static: tuple[Axes, float], arrays: tuple[Any, Any]) -> "Adapted":
        return cls(*arrays, *static)


def adapted(lora: config.LoRA, params: Params) -> Params:
    """The model's parameters, the targets as `Adapted`."""
    adapters, targets = adapters_of(params), targets_of(lora, params)

    def joined(path: str, w: Any) -> Any:
        return Adapted(w, adapters[path], targets[path], lora.alpha / lora.rank) if path in targets else w

    return map_with_paths(joined, base_of(params))


def adapters_of(params: Params) -> dict[str, dict[str, Array]]:
    """The adapter of each target, by its path."""
    found: dict[str, dict[str, Array]] = {}
    for path, x in by_path(params[ADAPTERS]).items():
        target, _, name = path.rpartition(".")
        found.setdefault(target, {})[name] = x
    return found


def _split(entries: tuple[Any, ...], axes: Axes) -> tuple[tuple[Any, ...], ...]:
    """What there is for each axis of a matrix, for its own, its inputs and its outputs."""
    first, last = len(entries) - sum(axes), len(entries) - axes.outputs
    return entries[:first], entries[first:last], entries[last:]


def _input_axes(w: Array, axes: Axes) -> tuple[int, ...]:
    return tuple(range(w.ndim - sum(axes), w.ndim - axes.outputs))


def _entries(w: Array) -> tuple[Any, ...]:
    """The mesh axes of each axis of `w`, as its type records them."""
    entries = tuple(jax.typeof(w).sharding.spec)
    return entries + (None,) * (w.ndim - len(entries))


def _laid_out(x: Array, entries: tuple[Any, ...] | None) -> Array:
    assert entries is not None
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, PartitionSpec(*entries))


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries by the parts of paths; numbers are the keys of lists."""
    tree: dict[Any, Any] = {}
    for path, value in leaves.items():
        *parents, name = (int(part) if part.isdecimal() else part for part in path.split("."))
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = value
    return tree
