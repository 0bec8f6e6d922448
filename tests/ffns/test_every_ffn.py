"""What holds for every registered FFN at every example, and each gated MLP against its formula in float64.

Letters: b batch, t time, d model width, f FFN width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from hybridlm import config
from hybridlm.ffns import FFNS
from hybridlm.ffns.base import Pass
from hybridlm.mixers.base import Context, Segments
from hybridlm.sharding import make_mesh, spec

B, T, D = 8, 13, 32
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2
CONTEXT = Context(width=D, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())


def examples_of(keep: Callable[[config.FFN], bool]) -> pytest.MarkDecorator:
    numbered = [(cfg, i) for entry in FFNS.entries.values() for i, cfg in enumerate(entry.examples)]
    return pytest.mark.parametrize(
        "cfg", [pytest.param(cfg, id=f"{type(cfg).__name__}{i}") for cfg, i in numbered if keep(cfg)]
    )


examples = examples_of(lambda cfg: True)
ACTIVATIONS = {
    config.GLU: lambda z: 1 / (1 + np.exp(-z)),
    config.Bilinear: lambda z: z,
    config.ReGLU: lambda z: np.maximum(z, 0),
    config.GeGLU: lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    config.SwiGLU: lambda z: z / (1 + np.exp(-z)),
}


@functools.cache
def abstract_module(cfg: config.FFN, context: Context = CONTEXT) -> tuple[Any, Any]:
    """Its definition, and abstract parameters as nested dicts."""
    graphdef, state = nnx.split(jax.eval_shape(lambda: Alone(cfg, context, nnx.Rngs(params=jax.random.key(0)))))
    return graphdef, nnx.to_pure_dict(state)


class Alone(nnx.Module):
    """An FFN with what a model has for all layers of its kind."""

    def __init__(self, cfg: config.FFN, context: Context, rngs: nnx.Rngs):
        module = FFNS.module_of(cfg)
        self.ffn = module(cfg, context, rngs)
        self.shared = nnx.Dict(module.shared(cfg, context, rngs) if hasattr(module, "shared") else {})
        self.init_carry = functools.partial(getattr(module, "init_carry", lambda *_: {}), cfg, context)

    def __call__(self, x: jax.Array, segments: Segments) -> tuple[jax.Array, dict[str, jax.Array]]:
        given = Pass(jnp.zeros(x.shape[:2], jnp.int32), shared=dict(self.shared))
        return self.ffn(x, segments, self.init_carry(*x.shape[:2]), given)[:2]


@functools.cache
def compiled(cfg: config.FFN) -> Any:
    """(params, x, segments) -> (y, aux), jitted."""
    graphdef, _ = abstract_module(cfg)
    return jax.jit(lambda params, x, segments: nnx.merge(graphdef, params)(x, segments))


def random_params(cfg: config.FFN, rng: np.random.Generator) -> Any:
    def draw(path: tuple[Any, ...], a: Any) -> np.ndarray:
        drawn = 0.2 * rng.standard_normal(a.shape).astype(np.float32)
        return 1 + np.abs(drawn) if path[-1].key == "running_variance" else drawn

    return jax.tree_util.tree_map_with_path(draw, abstract_module(cfg)[1])


@examples
def test_output_has_the_shape_and_dtype_of_the_input(cfg: config.FFN, rng: np.random.Generator) -> None:
    params, x = random_params(cfg, rng), inputs(rng)
    for dtype in (jnp.float32, jnp.bfloat16):
        y, aux = jax.eval_shape(compiled(cfg), params, jax.ShapeDtypeStruct(x.shape, dtype), segments())
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert all(value.shape == () for value in aux.values())


@examples
def test_no_token_sees_another(cfg: config.FFN, rng: np.random.Generator) -> None:
    params, x = random_params(cfg, rng), inputs(rng)
    changed = np.concatenate([x[:, :5], inputs(rng)[:, 5:6], x[:, 6:]], axis=1)
    y, y_changed = (compiled(cfg)(params, given, segments())[0] for given in (x, changed))
    others = np.arange(T) != 5
    np.testing.assert_array_equal(y[:, others], y_changed[:, others])
    assert distance(y_changed[:, 5], y[:, 5]) > 0.1


@examples_of(lambda cfg: isinstance(cfg, config.GatedMLP))
def test_gated_mlp_equals_its_formula(cfg: config.GatedMLP, rng: np.random.Generator) -> None:
    params, x = random_params(cfg, rng), inputs(rng)
    y, aux = compiled(cfg)(params, x, segments())
    p, z = jax.tree.map(lambda a: np.asarray(a, np.float64), (params["ffn"], x))

    def linear(name: str, z: np.ndarray) -> np.ndarray:
        return z @ p[name]["w"] + (p[name]["b"] if cfg.bias else 0.0)

    want = linear("down", ACTIVATIONS[type(cfg)](linear("gate", z)) * linear("up", z))
    assert distance(y, want) < FORWARD_TOLERANCE
    assert aux == {}
    assert {name: set(leaves) for name, leaves in p.items()} == {
        name: {"w", "b"} if cfg.bias else {"w"} for name in ("gate", "up", "down")
    }


@examples
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_sharded_equals_unsharded(cfg: config.FFN, rng: np.random.Generator, shape: tuple[int, int, int]) -> None:
    params, x, cotangent = random_params(cfg, rng), inputs(rng), inputs(rng)

    def gradients(graphdef: Any, params: Any, x: Any, segments: Segments, cotangent: Any) -> Any:
        def objective(params: Any, x: Any) -> Any:
            y = nnx.merge(graphdef, params)(x, segments)[0]
            return jnp.sum(y * cotangent), y

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x)

    run = jax.jit(gradients, static_argnums=0)
    want = run(abstract_module(cfg)[0], params, x, segments(), cotangent)
    data, fsdp, tensor = shape
    mesh = make_mesh(config.Mesh(data=data, fsdp=fsdp, tensor=tensor))
    with jax.set_mesh(mesh):
        graphdef, like = abstract_module.__wrapped__(cfg)
        rows = NamedSharding(mesh, spec("batch"))
        placed = jax.tree.map(lambda a, at: jax.device_put(a, NamedSharding(mesh, at.sharding.spec)), params, like)
        got = run(graphdef, placed, *jax.device_put((x, segments(), cotangent), rows))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert distance(a, b) < GRADIENT_TOLERANCE


@examples_of(lambda cfg: not isinstance(cfg, config.MoE))  # of a loop over tiles XLA counts the body once
def test_flops_are_those_that_xla_counts(cfg: config.FFN) -> None:
    graphdef, params = abstract_module(cfg, Context(**{**vars(CONTEXT), "width": 512}))
    x = jax.ShapeDtypeStruct((B, T, 512), jnp.float32)

    def forward(params: Any, x: Any, segments: Segments) -> Any:
        return nnx.merge(graphdef, params)(x, segments)[0]

    cost = jax.jit(forward).lower(params, x, segments()).compile().cost_analysis()
    context = Context(**{**vars(CONTEXT), "width": 512})
    assert FFNS.module_of(cfg).flops(cfg, context) == pytest.approx(cost["flops"] / (B * T), rel=0.15)


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((B, T, D)).astype(np.float32)


def segments() -> Segments:
    return Segments(np.ones((B, T), np.int32), np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)))


def distance(got: Any, want: Any) -> float:
    """Relative L2."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
