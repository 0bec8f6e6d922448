"""Memory layers ready to run, and their comparison with an oracle. Letters: b batch, t time, d model width.

An oracle is the paper's formula in float64 with a comparison of every query with every row.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.ffns.base import Pass
from hybridlm.ffns.memory.peer import PEER
from hybridlm.ffns.memory.product_key_memory import MemoryPlus, ProductKeyMemory
from hybridlm.ffns.memory.ultramem import UltraMem
from hybridlm.mixers.base import Context, Segments

MODULES: dict[type[config.Memory], Any] = {
    config.ProductKeyMemory: ProductKeyMemory,
    config.MemoryPlus: MemoryPlus,
    config.PEER: PEER,
    config.UltraMem: UltraMem,
}
B, T, D = 8, 5, 12
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3  # relative L2 of float32, and against differences of float64

Oracle = Callable[..., tuple[np.ndarray, dict[str, float]]]
"""(params of the layer, its tables by their names' endings, x [n, d], real [n], training) -> y [n, d], losses."""


def run(layers: tuple[Any, ...], tables: Any, params: Any, x: Any, segments: Segments, training: bool) -> Any:
    """y [layers, b, t, d], all of the same x, and aux values by layer."""
    shared = {name: nnx.merge(graphdef, params["shared"][name]) for name, graphdef in tables}
    tokens = jnp.zeros(x.shape[:2], jnp.int32)
    given = Pass(tokens, key=jax.random.key(0) if training else None, shared=shared)
    ys, reports = [], []
    for i, (graphdef, of_layer) in enumerate(zip(layers, params["layers"], strict=True)):
        y, aux, _ = nnx.merge(graphdef, of_layer)(x, segments, {}, given._replace(layer=i))
        ys.append(y)
        reports.append(aux)
    return jnp.stack(ys), reports


def gradients(layers: Any, tables: Any, params: Any, x: Any, segments: Segments, cotangent: Any, training: bool) -> Any:
    def objective(params: Any, x: Any) -> Any:
        ys, reports = run(layers, tables, params, x, segments, training)
        losses = sum(value for aux in reports for name, value in aux.items() if name.endswith("_loss"))
        return jnp.sum(ys * cotangent) + losses, ys

    return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x)


jitted_run = jax.jit(run, static_argnums=(0, 1, 5))
jitted_gradients = jax.jit(gradients, static_argnums=(0, 1, 6))


def make_context(cfg: config.Memory, num_layers: int) -> Context:
    ffns = (cfg,) * num_layers
    return Context(D, num_layers, 1e-6, jnp.dtype(jnp.float32), config.Kernels(), ffns)


def define(cfg: config.Memory, num_layers: int) -> tuple[Any, Any, Any]:
    """Definitions of layers and of tables, and abstract parameters."""
    module, context = MODULES[type(cfg)], make_context(cfg, num_layers)

    def split(make: Callable[[], Any]) -> tuple[Any, Any]:
        graphdef, state = nnx.split(jax.eval_shape(make))
        return graphdef, nnx.to_pure_dict(state)

    layer, params = split(lambda: module(cfg, context, nnx.Rngs(params=jax.random.key(0))))
    names = [*jax.eval_shape(lambda: module.shared(cfg, context, nnx.Rngs(params=jax.random.key(0))))]
    tables = {
        name: split(lambda name=name: module.shared(cfg, context, nnx.Rngs(params=jax.random.key(0)))[name])
        for name in names
    }
    definitions = tuple((name, graphdef) for name, (graphdef, _) in tables.items())
    shared = {name: state for name, (_, state) in tables.items()}
    return (layer,) * num_layers, definitions, {"layers": [params] * num_layers, "shared": shared}


cached_define = functools.cache(define)


@dataclass(frozen=True)
class Built:
    """Layers of one config over random parameters, normal with `scale`."""

    cfg: config.Memory
    layers: Any
    tables: Any
    params: Any

    def __call__(self, x: np.ndarray, segments: Segments, *, params: Any = None, training: bool = False) -> Any:
        return jitted_run(self.layers, self.tables, self.params if params is None else params, x, segments, training)

    def gradients(self, x: np.ndarray, segments: Segments, cotangent: np.ndarray, *, training: bool = False) -> Any:
        """(d_params, d_x), y of <y, cotangent> plus losses."""
        return jitted_gradients(self.layers, self.tables, self.params, x, segments, cotangent, training)

    def expected(
        self, oracle: Oracle, params: Any, x: np.ndarray, real: np.ndarray, training: bool
    ) -> tuple[np.ndarray, float]:
        """The oracle's y [layers, b, t, d] and the sum of losses, in float64."""
        ys, total = [], 0.0
        for i, of_layer in enumerate(params["layers"]):
            tables = {}
            for name, state in params["shared"].items():
                table = state["table"].reshape(-1, np.prod(state["table"].shape[1:]))
                count = 1 if self.cfg.num_tables == 1 else len(params["layers"])
                tables[name] = np.split(table, count)[i if count > 1 else 0]
            y, losses = oracle(self.cfg, of_layer, tables, x.reshape(-1, D), real.reshape(-1), training)
            ys.append(y.reshape(x.shape))
            total += sum(losses.values())
        return np.stack(ys), total


Build = Callable[..., Built]


@pytest.fixture
def build(rng: np.random.Generator) -> Build:
    """build(cfg, num_layers=1, scale=0.5): layers that all read the same x."""

    def built(cfg: config.Memory, num_layers: int = 1, scale: float = 0.5) -> Built:
        layers, tables, like = cached_define(cfg, num_layers)
        params = jax.tree.map(lambda a: scale * rng.standard_normal(a.shape).astype(np.float32), like)
        for of_layer in params["layers"]:
            if "running_variance" in (norm := of_layer.get("retrieval", {}).get("query_norm", {})):
                norm["running_variance"] = np.abs(norm["running_variance"]) + np.float32(0.5)
        return Built(cfg, layers, tables, params)

    return built


def batch(rng: np.random.Generator) -> tuple[np.ndarray, Segments, np.ndarray]:
    """x, segments of packed documents with padding, and the real tokens."""
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    ids = np.repeat([[1, 1, 2, 2, 2]], B, axis=0).astype(np.int32)
    ids[0, 3:] = ids[5, 1:] = 0
    positions = np.repeat([[0, 1, 0, 1, 2]], B, axis=0).astype(np.int32)
    return x, Segments(ids, positions), ids != 0


def distance(got: Any, want: Any) -> float:
    """Relative L2."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def assert_agrees(built: Built, oracle: Oracle, rng: np.random.Generator, *, training: bool = False) -> None:
    """y equals the oracle's, and the gradient of each parameter, and of x, its slopes along random directions."""
    x, segments, real = batch(rng)
    cotangent = rng.standard_normal((len(built.layers), *x.shape)).astype(np.float32)
    (d_params, d_x), y = built.gradients(x, segments, cotangent, training=training)
    point = jax.tree.map(lambda a: np.asarray(a, np.float64), (built.params, x))
    want, _ = built.expected(oracle, *point, real, training)
    assert distance(y, want) < VALUE_TOLERANCE
    assert np.all(np.asarray(y)[:, ~real] == 0.0)

    def objective(params: Any, x: np.ndarray) -> float:
        y, losses = built.expected(oracle, params, x, real, training)
        return float(np.sum(y * cotangent)) + losses

    leaves, form = jax.tree.flatten(point)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(point)]
    for i, (path, gradient) in enumerate(zip(paths, jax.tree.leaves((d_params, d_x)), strict=True)):
        if "running" in path:
            continue  # their gradient is no derivative
        direction = rng.standard_normal(leaves[i].shape)
        values = [
            objective(*jax.tree.unflatten(form, [*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]]))
            for step in (1e-6, -1e-6)
        ]
        slope, got = (values[0] - values[1]) / 2e-6, float(np.sum(np.asarray(gradient, np.float64) * direction))
        assert abs(got - slope) <= GRADIENT_TOLERANCE * np.linalg.norm(gradient), (path, got, slope)
        assert np.linalg.norm(gradient) > 0.0, path


@pytest.fixture
def agrees(rng: np.random.Generator) -> Callable[..., None]:
    """`assert_agrees(built, oracle, training=...)`."""

    def compare(built: Built, oracle: Oracle, **options: Any) -> None:
        assert_agrees(built, oracle, rng, **options)

    return compare


@pytest.fixture
def same_on_a_mesh(rng: np.random.Generator) -> Callable[..., None]:
    """compare(built, shape): eight devices give what one gives, gradients too."""

    def compare(built: Built, shape: tuple[int, int, int, int], *, training: bool = False) -> None:
        from jax.sharding import NamedSharding, PartitionSpec

        from hybridlm.sharding import make_mesh, spec

        x, segments, _ = batch(rng)
        cotangent = rng.standard_normal((len(built.layers), *x.shape)).astype(np.float32)
        want = built.gradients(x, segments, cotangent, training=training)
        mesh = make_mesh(config.Mesh(**dict(zip(("data", "fsdp", "expert", "tensor"), shape, strict=True))))
        with jax.set_mesh(mesh):
            layers, tables, like = define(built.cfg, len(built.layers))
            placed = jax.tree.map(
                lambda a, at: jax.device_put(a, NamedSharding(mesh, at.sharding.spec)), built.params, like
            )
            rows = spec("batch")
            x, segments = jax.device_put((x, segments), NamedSharding(mesh, rows))
            cotangent = jax.device_put(cotangent, NamedSharding(mesh, PartitionSpec(None, *rows)))
            got = jitted_gradients(layers, tables, placed, x, segments, cotangent, training)
        for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
            assert distance(a, b) < 1e-4, jax.tree_util.keystr(path)

    return compare


@pytest.fixture
def bfloat16_errors(build: Build, rng: np.random.Generator) -> Callable[[config.Memory], np.ndarray]:
    """Of each token, the relative L2 by which bfloat16 activations change what a layer gives."""

    def measure(cfg: config.Memory) -> np.ndarray:
        built, ids = build(cfg), np.ones((B, T), np.int32)
        narrow = jnp.asarray(rng.standard_normal((B, T, D)), jnp.bfloat16)
        (y, _), (want, _) = (built(x, Segments(ids, ids)) for x in (narrow, np.asarray(narrow, np.float32)))
        assert y.dtype == jnp.bfloat16
        return np.linalg.norm(np.asarray(y - want, np.float64), axis=-1) / np.linalg.norm(want, axis=-1)

    return measure
