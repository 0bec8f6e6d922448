"""A training step on a memory's table alone: what the compiler says of it for a TPU slice that is not there.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python kernels/benchmarks/memory_table.py --topology v5e:4x4

4,096 tokens per chip read 64 rows each, of width 512, in bfloat16; the rows are given. `lookup` is the forward pass;
`step` adds the gradient of the weights and the update of the rows that were read, by row-wise Adagrad, in place;
`dense` instead makes the gradient of the whole table and updates it by Adam. Per chip: memory of arguments, temporaries
and at the peak, and what the collectives of the HLO hold. Letters: b batch, t time, k rows per token, v row width.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import topologies
from moe_layer import collectives

from hybridlm.config import Kernels, Memory, Mesh, RowAdagrad
from hybridlm.ffns.base import Pass
from hybridlm.ffns.memory.table import Read, Table
from hybridlm.mixers.base import Context
from hybridlm.sharding import make_mesh, spec
from hybridlm.table_optim import init_rows, update_rows

B, T, K, V = 4, 1024, 64, 512  # of one chip
SPREADS = {
    "rows": Mesh(data=1, fsdp=-1),
    "columns": Mesh(data=-1, fsdp=4),  # blocks of 128: four copies of the table on sixteen chips
    "grid": Mesh(data=1, fsdp=-1, expert=2),
    "grid, blocks of 128": Mesh(data=1, fsdp=-1, expert=4),
}
Case = tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]


def cases(rows: int, spread: str, impl: str) -> dict[str, Case]:
    """(function, abstract arguments, those that are donated) by name, on the mesh in scope."""
    b = B * jax.sharding.get_abstract_mesh().size
    kind: Any = spread.partition(",")[0]
    cfg = Memory(num_rows=rows, table_dtype="bfloat16", spread=kind)
    context = Context(V, 1, 1e-6, jnp.dtype("bfloat16"), Kernels(memory_lookup=impl))  # pyright: ignore
    normal = nnx.initializers.normal(V**-0.5)

    def make() -> Table:
        return Table("table", rows, V, cfg, context, nnx.Rngs(params=jax.random.key(0)), normal, reads_per_token=K)

    graphdef, params = nnx.split(jax.eval_shape(make))
    rule = RowAdagrad()

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), spec("batch"))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    indices, weights, dy = (
        array((b, T, *rest), d) for rest, d in (((K,), "int32"), ((K,), "bfloat16"), ((V,), "bfloat16"))
    )

    def lookup(params: Any, indices: Any, weights: Any, taps: Any = None) -> Any:
        given = Pass(indices[..., 0], taps=taps)
        return nnx.merge(graphdef, params).lookup(indices, weights, given)[0]

    def step(params: Any, state: Any, indices: Any, weights: Any, dy: Any) -> Any:
        table = nnx.merge(graphdef, params)

        def answer(weights: Any, tap: Any) -> Any:
            return lookup(params, indices, weights, {"table": tap})

        _, vjp = jax.vjp(answer, weights, jnp.zeros_like(dy))
        dweights, answers = vjp(dy)
        told = {"lr": jnp.float32(1e-3), "step": jnp.int32(0), "scale": jnp.float32(1), "key": jax.random.key(0)}
        reads = [Read(indices, weights, answers)]
        new, state, used = table.updated(partial(update_rows, rule), state, reads, jnp.bool(True), told)
        return dweights, new, state, used

    adam = optax.adam(1e-3, mu_dtype=jnp.float32)

    def dense(params: Any, state: Any, indices: Any, weights: Any, dy: Any) -> Any:
        _, vjp = jax.vjp(lambda params, weights: lookup(params, indices, weights), params, weights)
        grads, dweights = vjp(dy)
        updates, state = adam.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), state)
        return dweights, jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates), state

    def moments(params: Any) -> Any:
        return adam.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    table = jax.tree.leaves(params)[0]
    state = jax.eval_shape(partial(init_rows, rule), table)
    return {
        "lookup": (lookup, (params, indices, weights), ()),
        "step": (step, (params, state, indices, weights, dy), (0, 1)),
        "dense": (dense, (params, jax.eval_shape(moments, params), indices, weights, dy), (0, 1)),
    }


def compile_for(topology: str, millions: int, spread: str, names: list[str], impl: str) -> None:
    """One line per case."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    with jax.set_mesh(make_mesh(SPREADS[spread], devices)):
        for name, (function, args, donated) in cases(millions * 1024**2, spread, impl).items():
            if name not in names:
                continue
            title = f"{topology} | {millions}M | {spread} | {name}"
            try:
                compiled: Any = jax.jit(function, donate_argnums=donated).lower(*args).compile()
            except jax.errors.JaxRuntimeError as error:
                print(f"{title} | {str(error).splitlines()[0][:200]}", flush=True)
                continue
            memory = compiled.memory_analysis()
            sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.peak_memory_in_bytes
            print(" | ".join((title, *(f"{s / 2**30:.3f}" for s in sizes), collectives(compiled))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", action="append", required=True, help="v5e:4x4, v5p:2x2x4, ...")
    parser.add_argument("--millions", type=int, action="append", help="rows, in 2^20; a power of 4 (default 1, 4, 16)")
    parser.add_argument("--spread", action="append", choices=SPREADS, help="default: all")
    parser.add_argument("--case", action="append", choices=("lookup", "step", "dense"), help="default: all")
    parser.add_argument("--impl", default="auto", help="of the lookup")
    args = parser.parse_args()
    print("topology | rows | spread | case | arguments GiB | temporaries GiB | peak GiB | collectives")
    for topology in args.topology:
        for millions in args.millions or (1, 4, 16):
            for spread in args.spread or SPREADS:
                compile_for(topology, millions, spread, args.case or ["lookup", "step", "dense"], args.impl)


if __name__ == "__main__":
    main()
