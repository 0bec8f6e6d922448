"""Which implementation every kernel operation of a model takes, found by tracing the model for the devices meant."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from hybridlm_kernels import UnsupportedKernel, explain
from hybridlm_kernels.dispatch import Explanation, record_choices
from jax.sharding import AbstractMesh, NamedSharding

from hybridlm.config import Config, Mesh
from hybridlm.config_check import ConfigError
from hybridlm.mixers.base import Segments
from hybridlm.model import build
from hybridlm.plan.topology import Topology
from hybridlm.sharding import check_batch, spec
from hybridlm.train.mesh_choice import run_mesh


@dataclass(frozen=True)
class Row:
    """One operation: the pass that calls it, its operands as JAX prints their types, and what it takes."""

    phase: str
    operands: tuple[str, ...]
    choice: Explanation


def kernels_of(config: Config, topology: Topology | None) -> list[Row]:
    """The operations of a training step and of a decoding step, each kind once; on this process's devices if no others
    are given.

    Raises ConfigError where the mesh or the batch do not fit the devices, or where a tier that the config names cannot
    serve.
    """
    mesh: Any = run_mesh(config).abstract_mesh if topology is None else topology.abstract_mesh(topology.mesh_of(config))
    check_batch(config, mesh)
    jax.clear_caches()  # choices are recorded while tracing, and what JAX has traced before it does not trace again
    found = [*_training(config, mesh), *_decoding(config, mesh)]
    return list(dict.fromkeys(found))


def _training(config: Config, mesh: AbstractMesh) -> list[Row]:
    def features(params: Any, x: jax.Array, step: jax.Array, key: jax.Array) -> jax.Array:
        return bind(params).features(x, Segments(x, x), step=step, key=key)[0]

    with jax.sharding.use_abstract_mesh(mesh):
        bind, params = _model(config)
        x = _tokens(mesh, config.train.batch_size // config.train.num_microbatches, config.data.seq_len)
        step, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
        with _refusals_as_config_errors(), record_choices() as found:
            jax.eval_shape(features, params, x, step, key)
    return [Row("train", tuple(types), choice) for choice, types in found]


def _decoding(config: Config, mesh: AbstractMesh) -> list[Row]:
    """Of one token, which nothing cuts: devices of `context` have sequences of their own, as those of `fsdp` do."""
    sizes = dict(mesh.shape)
    rows = sizes["context"] * config.train.batch_size // config.train.num_microbatches
    sizes |= {"fsdp": sizes["fsdp"] * sizes["context"], "context": 1}
    mesh = mesh.update(axis_sizes=tuple(sizes.values()))
    with jax.sharding.use_abstract_mesh(mesh):
        bind, params = _model(config)
        state = jax.eval_shape(lambda params: bind(params).init_state(rows, config.data.seq_len), params)
        with _refusals_as_config_errors(), record_choices() as found:
            jax.eval_shape(lambda params, x, state: bind(params)(x, None, state), params, _tokens(mesh, rows, 1), state)
    return [Row("decode", tuple(types), choice) for choice, types in found]


def _model(config: Config) -> tuple[Any, Any]:
    """`bind`, and abstract parameters on the mesh in scope."""
    init, bind = build(config.model, config.kernels)
    return bind, jax.eval_shape(lambda: init(jax.random.key(0)))


def _tokens(mesh: AbstractMesh, rows: int, time: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, time), jnp.int32, sharding=NamedSharding(mesh, spec("sequences", "time")))


def kernels_at(topology: Topology | None) -> list[Row]:
    """Every operation, for who has no config at hand.

    At 2560 channels, 16 heads of 128, 16 experts of 2048 x 1024, or a million rows of 512.
    """
    x = jax.ShapeDtypeStruct((1, 4096, 2560), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    taps = jax.ShapeDtypeStruct((4, 2560), jnp.float32)
    heads = jax.ShapeDtypeStruct((1, 4096, 16, 128), jnp.bfloat16)
    per_head = jax.ShapeDtypeStruct(heads.shape[:3], jnp.float32)
    rows = jax.ShapeDtypeStruct((16384, 2048), jnp.bfloat16)
    experts = jax.ShapeDtypeStruct((16, 2048, 1024), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((2**20, 4, 128), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((4096, 64), jnp.int32)
    calls = {
        "linear_scan": (x, x),
        "rg_lru": (x, gate, gate),
        "short_conv": (x, taps),
        "gated_linear_attention": (heads, heads, heads, per_head),
        "gated_delta_rule": (heads, heads, heads, per_head, per_head),
        "grouped_matmul": (rows, experts, jax.ShapeDtypeStruct((16,), jnp.int32)),
        "memory_lookup": (table, indices, jax.ShapeDtypeStruct((4096, 64), jnp.bfloat16)),
        "memory_scores": (table, indices, jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16)),
    }
    scope = contextlib.nullcontext()
    if topology is not None:
        scope = jax.sharding.use_abstract_mesh(topology.abstract_mesh(Mesh(data=-1)))
    with scope:
        return [
            Row("train", tuple(str(jax.typeof(v)) for v in operands), explain(op, *operands))
            for op, operands in calls.items()
        ]


@contextlib.contextmanager
def _refusals_as_config_errors() -> Iterator[None]:
    try:
        yield
    except UnsupportedKernel as refusal:
        raise ConfigError("kernels", f": {refusal}") from None
