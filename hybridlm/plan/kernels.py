"""Which implementation every kernel operation of a model takes, found by tracing the model for the devices meant."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from hybridlm_kernels import UnsupportedKernel, explain
from hybridlm_kernels.dispatch import Explanation, record_choices
from jax.sharding import NamedSharding

from hybridlm.config import Config, Mesh
from hybridlm.config_check import ConfigError
from hybridlm.mixers.base import Segments
from hybridlm.model import build
from hybridlm.plan.topology import Topology
from hybridlm.sharding import check_batch, make_mesh, spec


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
    wanted = config.sharding.mesh
    mesh: Any = make_mesh(wanted).abstract_mesh if topology is None else topology.mesh(wanted)
    check_batch(config.train, mesh)
    jax.clear_caches()  # choices are recorded while tracing, and what JAX has traced before it does not trace again
    with jax.sharding.use_abstract_mesh(mesh):
        init, bind = build(config.model, config.kernels)
        key = jax.eval_shape(lambda: jax.random.key(0))
        params = jax.eval_shape(init, key)
        batch = config.train.batch_size // config.train.num_microbatches

        def tokens(time: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch, time), jnp.int32, sharding=NamedSharding(mesh, spec("batch", None)))

        with _refusals_as_config_errors(), record_choices() as training:
            x = tokens(config.data.seq_len)
            jax.eval_shape(partial(_training_features, bind), params, x, jax.ShapeDtypeStruct((), jnp.int32), key)
        with _refusals_as_config_errors(), record_choices() as decoding:
            state = jax.eval_shape(lambda params: bind(params).init_state(batch, config.data.seq_len), params)
            jax.eval_shape(lambda params, x, state: bind(params)(x, None, state), params, tokens(1), state)
    rows = [Row("train", tuple(types), choice) for choice, types in training]
    rows += [Row("decode", tuple(types), choice) for choice, types in decoding]
    return list(dict.fromkeys(rows))


def _training_features(bind: Any, params: Any, x: jax.Array, step: jax.Array, key: jax.Array) -> jax.Array:
    return bind(params).features(x, Segments(x, x), step=step, key=key)[0]


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
        scope = jax.sharding.use_abstract_mesh(topology.mesh(Mesh(data=-1)))
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
