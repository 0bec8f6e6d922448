"""One mixture-of-experts layer: what the compiler says of it for a TPU slice that is not there, or its speed here.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python kernels/benchmarks/moe_layer.py --topology v5e:4x4
    python kernels/benchmarks/moe_layer.py --measure

With --topology: width 2048, 64 experts of width 1024, 8 per token, 16,384 tokens per chip, bfloat16, experts over all
chips; forward, and forward with the gradients of tokens and parameters. Per chip: XLA's count of FLOPs (of Pallas
kernels it takes the word of the kernel), memory of temporaries, and what the collectives of its HLO hold. With
--measure: tokens per second, forward and backward, over those of a dense layer with the same active FLOPs.
Letters: b batch, t time, d model width.
"""

import argparse
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels.bench.hlo import array_bytes
from jax.experimental import topologies
from jax.sharding import AxisType

from hybridlm.config import FFN, Capacity, Dispatch, Dropless, Kernels, Mesh, MoE, SwiGLU, TopK
from hybridlm.ffns import FFNS
from hybridlm.ffns.base import Pass
from hybridlm.mixers.base import Context, Segments
from hybridlm.sharding import MESH_AXES, mesh_shape, spec

DISPATCHES: dict[str, Dispatch] = {
    "ragged, buffer 1.25": Dropless(buffer_factor=1.25),
    "ragged, buffer 2": Dropless(buffer_factor=2.0),
    "ragged, room for all": Dropless(buffer_factor=None),
    "padded, buffer 1.25": Dropless(buffer_factor=1.25, exchange="padded"),
    "one-hot 1.25, groups of 512": Capacity(factor=1.25, group_size=512),
    "one-hot 1.25, groups of 1024": Capacity(factor=1.25, group_size=1024),
}
COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute)(?:-done)?\("
)
"""The result of a collective, or of the end of one that runs beside other work."""


def layer(cfg: FFN, width: int, dtype: str) -> tuple[Callable[[Any, Any, Any], Any], Any]:
    """`forward(params, x, segments) -> (y, losses)`, and its abstract parameters."""
    context = Context(width=width, num_layers=1, norm_eps=1e-6, dtype=jnp.dtype(dtype), kernels=Kernels())
    module = FFNS.module_of(cfg)
    graphdef, state = nnx.split(jax.eval_shape(lambda: module(cfg, context, nnx.Rngs(params=jax.random.key(0)))))

    def forward(params: Any, x: jax.Array, segments: Segments) -> tuple[jax.Array, jax.Array]:
        given = Pass(segments.ids, jnp.int32(0), jax.random.key(0))
        y, aux, _ = nnx.merge(graphdef, params)(x, segments, {}, given)
        return y, sum((value for name, value in aux.items() if name.endswith("_loss")), jnp.zeros(()))

    return forward, nnx.to_pure_dict(state)


def with_gradient(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(params: Any, x: jax.Array, segments: Segments, dy: jax.Array) -> Any:
        _, vjp = jax.vjp(lambda params, x: forward(params, x, segments), params, x)
        return vjp((dy, jnp.ones(())))

    return run


def compile_for(topology: str, name: str) -> None:
    """One line per pass."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    shape = mesh_shape(Mesh(data=1, expert=-1), len(devices))
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(shape), devices=devices)
    cfg = MoE(num_experts=64, hidden=1024, router=TopK(k=8), dispatch=DISPATCHES[name])
    with jax.set_mesh(mesh):
        forward, params = layer(cfg, 2048, "bfloat16")
        rows = jax.NamedSharding(mesh, spec("batch"))
        b, t = 8 * len(devices), 2048
        x = jax.ShapeDtypeStruct((b, t, 2048), jnp.bfloat16, sharding=rows)
        ids = jax.ShapeDtypeStruct((b, t), jnp.int32, sharding=rows)
        segments = Segments(ids, ids)
        for label, function, args in (
            ("forward", forward, (params, x, segments)),
            ("forward+backward", with_gradient(forward), (params, x, segments, x)),
        ):
            report(f"{topology} | {name} | {label}", function, args)


def report(title: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Compile and print a line, with what the compiler says where the program does not fit."""
    try:
        compiled: Any = jax.jit(function).lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        print(f"{title} | {str(error).splitlines()[0][:200]}", flush=True)
        return
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    sizes = (memory.temp_size_in_bytes, memory.peak_memory_in_bytes)
    row = (title, f"{cost['flops'] / 1e12:.2f}", *(f"{size / 2**30:.2f}" for size in sizes), collectives(compiled))
    print(" | ".join(row), flush=True)


def collectives(compiled: Any) -> str:
    """How many of each kind there are in the HLO, and the MB of their results."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return "no text"  # libtpu's printer does not know every instruction that its compiler makes
    count, size = Counter(), Counter()
    for types, kind in COLLECTIVE.findall(text):
        count[kind] += 1
        size[kind] += array_bytes(types.replace("S(1)", ""))  # kept in VMEM or not, it has travelled
    return ", ".join(f"{number} {kind} {size[kind] / 1e6:.0f} MB" for kind, number in sorted(count.items()))


def measure(width: int) -> None:
    """4,096 tokens, float32; medians of seven; the layers take turns."""
    b, t, hidden = 4, 1024, 4 * width
    layers: dict[str, FFN] = {"dense": SwiGLU(hidden=hidden)}
    for x, k in ((8, 2), (32, 4), (64, 8)):
        router = TopK(k=k)
        layers[f"{k} of {x} experts, dropless"] = MoE(num_experts=x, hidden=hidden // k, router=router)
        dispatch = Capacity(factor=1.25, group_size=256)
        layers[f"{k} of {x} experts, one-hot 1.25"] = MoE(
            num_experts=x, hidden=hidden // k, router=router, dispatch=dispatch
        )
    key = jax.random.key(0)
    x, dy = jax.random.normal(key, (2, b, t, width))
    segments = Segments(jnp.ones((b, t), jnp.int32), jnp.broadcast_to(jnp.arange(t), (b, t)))
    runs, times = {}, {name: [] for name in layers}
    for name, cfg in layers.items():
        forward, abstract = layer(cfg, width, "float32")
        params = jax.tree.map(lambda a: width**-0.5 * jax.random.normal(key, a.shape), abstract)
        runs[name] = jax.jit(with_gradient(forward)), params
        jax.block_until_ready(runs[name][0](params, x, segments, dy))
    for _ in range(7):
        for name, (run, params) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(params, x, segments, dy))
            times[name].append(time.perf_counter() - start)
    dense = statistics.median(times["dense"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:32} {1e3 * median:8.1f} ms {b * t / median:10,.0f} tokens/s  {dense / median:.2f} of dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", action="append", default=[], help="v5e:4x4, v5p:2x2x4, ...")
    parser.add_argument("--dispatch", action="append", choices=DISPATCHES, help="default: all")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--width", type=int, default=256, help="of what is measured; a dense layer's hidden is 4 times")
    args = parser.parse_args()
    if args.topology:
        print("topology | dispatch | pass | TFLOP | temporaries GiB | peak GiB | collectives")
    for topology in args.topology:
        for name in args.dispatch or DISPATCHES:
            compile_for(topology, name)
    if args.measure:
        measure(args.width)


if __name__ == "__main__":
    main()
