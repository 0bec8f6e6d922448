"""The GPU kernels trace, gradients too, for operands that are divided among the GPUs of an absent host.

Letters: b batch, t time, d channels, h query-key heads, v value heads, k key or value dim, m rows, g groups.
"""

from functools import partial
from typing import Any

import hybridlm_kernels
import jax
import jax.numpy as jnp
import pytest
from hybridlm_kernels.dispatch import OPS
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="this JAX has no GPU kernels")
DIVIDED, WHOLE = PartitionSpec("data"), PartitionSpec()
H200S = AbstractMesh(
    (8,), ("data",), axis_types=(AxisType.Explicit,), abstract_device=AbstractDevice("NVIDIA H200", None, "gpu")
)
SIZES = {"b": 8, "t": 256, "d": 128, "h": 2, "v": 4, "k": 64, "m": 512, "g": 24}


def operand(letters: str, dtype: Any = jnp.float32, spec: PartitionSpec = DIVIDED) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct([SIZES[n] for n in letters], dtype, sharding=NamedSharding(H200S, spec))


X, QUERY, VALUE = operand("btd"), operand("bthk", jnp.bfloat16), operand("btvk", jnp.bfloat16)
PER_HEAD, PER_CHANNEL = operand("btv"), operand("btvk")
OPERANDS = {
    "linear_scan": [(X, X)],
    "rg_lru": [(X, X, X, operand("d", spec=WHOLE))],
    "short_conv": [(X, operand("hd", spec=WHOLE))],
    "gated_linear_attention": [(QUERY, QUERY, VALUE, gate) for gate in (PER_HEAD, PER_CHANNEL)],
    "gated_delta_rule": [(QUERY, QUERY, VALUE, PER_HEAD, gate) for gate in (PER_HEAD, PER_CHANNEL)],
    "grouped_matmul": [(operand("mk", jnp.bfloat16), operand("gkk", jnp.bfloat16), operand("g", jnp.int32))],
    "memory_lookup": [(operand("md"), operand("th", jnp.int32), operand("th"))],
    "memory_scores": [(operand("md"), operand("th", jnp.int32), operand("td"))],
}


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_divided_operands_lie_as_the_operands(op: str) -> None:
    function = partial(getattr(hybridlm_kernels, op), impl="pallas_gpu")
    if op in ("grouped_matmul", "memory_lookup", "memory_scores"):  # whose callers bring rows together
        function = jax.shard_map(function, mesh=H200S, in_specs=DIVIDED, out_specs=DIVIDED)

    def loss(*operands: Any) -> Any:
        return sum(jnp.sum(result.astype(jnp.float32)) for result in jax.tree.leaves(function(*operands)))

    for operands in OPERANDS[op]:
        floats = [i for i, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.floating)]
        with jax.sharding.use_abstract_mesh(H200S):
            gradients = jax.eval_shape(jax.grad(loss, floats), *operands)
        for gradient, i in zip(gradients, floats, strict=True):
            assert (gradient.shape, gradient.dtype) == (operands[i].shape, operands[i].dtype)
            assert gradient.sharding.is_equivalent_to(operands[i].sharding, gradient.ndim)
