"""The layer against a dense form that runs every expert on every token, on one device and over a mesh.

Letters: b batch, t time, n tokens, k experts per token, x experts, d model width, f FFN width.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hybridlm import config
from hybridlm.ffns.base import Pass
from hybridlm.ffns.gated_mlp import ACTIVATIONS, GatedMLP
from hybridlm.ffns.moe.exchange import all_to_all
from hybridlm.ffns.moe.layer import MoE
from hybridlm.ffns.moe.routers import ROUTERS
from hybridlm.ffns.moe.routing import Tokens
from hybridlm.mixers.base import Context, Segments
from hybridlm.sharding import make_mesh, spec

B, T, D, X = 8, 13, 12, 8
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2
CONTEXT = Context(width=D, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())
ROUTER = config.TopK(k=3, balance_loss=0.1, z_loss=0.1)
PLAIN = config.MoE(num_experts=X, hidden=10, router=ROUTER)
PADDED = config.Dropless(exchange="padded", buffer_factor=None)
ROOMY = config.Capacity(factor=float(X))
DISPATCHES = {
    "ragged": config.Dropless(buffer_factor=None),
    "padded": PADDED,
    "padded, 2 slices": replace(PADDED, slices=2),
    "capacity": ROOMY,
    "capacity, 2 slices": replace(ROOMY, slices=2),
}


@functools.cache
def abstract(cfg: config.MoE) -> tuple[Any, Any]:
    graphdef, state = nnx.split(jax.eval_shape(lambda: MoE(cfg, CONTEXT, nnx.Rngs(params=jax.random.key(0)))))
    return graphdef, nnx.to_pure_dict(state)


def random_params(cfg: config.MoE, rng: np.random.Generator) -> Any:
    return jax.tree.map(lambda a: 0.4 * rng.standard_normal(a.shape).astype(np.float32), abstract(cfg)[1])


def batch(rng: np.random.Generator) -> tuple[np.ndarray, Segments, np.ndarray]:
    """x, segments with padding at the ends of two rows, and the cotangent of y."""
    x, cotangent = rng.standard_normal((2, B, T, D)).astype(np.float32)
    ids = np.ones((B, T), np.int32)
    ids[0, 9:] = ids[5, 2:] = 0
    return x, Segments(ids, np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))), cotangent


def given(training: bool) -> Pass:
    tokens = jnp.zeros((B, T), jnp.int32)
    return Pass(tokens, jnp.int32(3), jax.random.key(1)) if training else Pass(tokens)


def outputs(graphdef: Any, params: Any, x: Any, segments: Segments, cotangent: Any, training: bool = True) -> Any:
    """Gradients of <y, cotangent> and the losses, y and aux."""

    def objective(params: Any, x: Any) -> Any:
        y, aux, _ = nnx.merge(graphdef, params)(x, segments, {}, given(training))
        losses = sum(value for name, value in aux.items() if name.endswith("_loss"))
        return jnp.sum(y * cotangent) + losses, (y, aux)

    return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x)


run = jax.jit(outputs, static_argnums=(0, 5))


@functools.partial(jax.jit, static_argnums=(0, 1))
def dense(cfg: config.MoE, graphdef: Any, params: Any, x: Any, segments: Segments, cotangent: Any) -> Any:
    """The same by all experts on all tokens, weighted by a matrix that is mostly 0."""

    def objective(params: Any, x: Any) -> Any:
        module = nnx.merge(graphdef, params)
        tokens = Tokens(x.reshape(-1, D), jnp.asarray(segments.ids.reshape(-1) != 0), T)
        routing, aux, _ = module.router(tokens, {}, given(True))
        weights = (
            jnp.zeros((B * T, X)).at[jnp.arange(B * T)[:, None], routing.experts].add(routing.weights, mode="drop")
        )
        p = params["experts"]
        act = ACTIVATIONS[getattr(config, cfg.activation)]
        hidden = act(jnp.einsum("nd,xdf->nxf", tokens.x, p["w_gate"])) * jnp.einsum("nd,xdf->nxf", tokens.x, p["w_up"])
        y = jnp.einsum("nxf,xfd,nx->nd", hidden, p["w_down"], weights).reshape(x.shape)
        if cfg.shared_hidden is not None:
            q = params["shared_expert"]
            shared = (act(x @ q["gate"]["w"]) * (x @ q["up"]["w"])) @ q["down"]["w"]
            y += jax.nn.sigmoid(x @ params["w_shared_gate"]) * shared
        return jnp.sum(y * cotangent) + sum(v for name, v in aux.items() if name.endswith("_loss")), y

    return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x)


def check(got: Any, want: Any, tolerance: float = GRADIENT_TOLERANCE) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert distance(a, b) < tolerance


def distance(got: Any, want: Any) -> float:
    """Relative L2."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


@pytest.mark.parametrize("dispatch", [DISPATCHES["ragged"], ROOMY], ids=["dropless", "capacity"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"router": replace(ROUTER, k=1, renormalize=False)},
        {"router": replace(ROUTER, k=X)},
        {"activation": "GeGLU", "shared_hidden": 9, "shared_gate": True},
    ],
    ids=["3 of 8", "1 of 8", "all", "shared expert"],
)
def test_values_and_gradients_equal_the_dense_form(change: Any, dispatch: Any, rng: np.random.Generator) -> None:
    cfg = replace(PLAIN, dispatch=dispatch, **change)
    params, given_batch = random_params(cfg, rng), batch(rng)
    gradients, (y, aux) = run(abstract(cfg)[0], params, *given_batch, True)
    want_gradients, want_y = dense(cfg, abstract(cfg)[0], params, *given_batch)
    assert distance(y, want_y) < FORWARD_TOLERANCE
    check(gradients, want_gradients)
    assert float(aux["moe_dropped"]) == 0.0


def test_all_tokens_to_one_expert(rng: np.random.Generator) -> None:
    """The other experts get no rows, and a gradient of exactly 0."""
    cfg = replace(PLAIN, router=replace(ROUTER, k=1, balance_loss=0.0, z_loss=0.0))
    params, (x, segments, cotangent) = random_params(cfg, rng), batch(rng)
    x[..., 0] = 1.0
    params["router"]["gate"]["w"][:] = 0
    params["router"]["gate"]["w"][0, 5] = 3.0
    (gradients, dx), (y, aux) = run(abstract(cfg)[0], params, x, segments, cotangent, True)
    want_gradients, want_y = dense(cfg, abstract(cfg)[0], params, x, segments, cotangent)
    assert distance(y, want_y) < FORWARD_TOLERANCE
    check((gradients["experts"], dx), (want_gradients[0]["experts"], want_gradients[1]))
    assert float(aux["moe_max_load"]) == X
    others = np.arange(X) != 5
    assert all(not np.any(np.asarray(g)[others]) for g in gradients["experts"].values())


def test_padding_costs_nothing_and_changes_nothing(rng: np.random.Generator) -> None:
    params, (x, segments, cotangent) = random_params(PLAIN, rng), batch(rng)
    padding = segments.ids == 0
    other = np.where(padding[..., None], 100 * rng.standard_normal(x.shape), x).astype(np.float32)
    (_, dx), (y, aux) = run(abstract(PLAIN)[0], params, x, segments, cotangent, True)
    (_, dx_other), (y_other, aux_other) = run(abstract(PLAIN)[0], params, other, segments, cotangent, True)
    assert not np.any(np.asarray(y)[padding]) and not np.any(np.asarray(dx)[padding])
    np.testing.assert_array_equal(y, y_other)
    np.testing.assert_array_equal(dx, dx_other)
    assert aux == aux_other
    assert float(aux["moe_experts_per_token"]) == 3.0


MESHES = (
    *({"data": 8 // e, "expert": e} for e in (1, 2, 4)),
    {"data": 1, "expert": 8},
    {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
)


def on_meshes() -> Iterator[Any]:
    """Each dispatch on the meshes that have a device along `expert` for each of its slices."""
    for sizes in MESHES:
        axes = " ".join(f"{axis}{size}" for axis, size in sizes.items())
        for name, dispatch in DISPATCHES.items():
            if sizes["expert"] % dispatch.slices == 0:
                marks = () if sizes["data"] == 1 else (pytest.mark.slow,)
                yield pytest.param(sizes, name, id=f"{axes}-{name}", marks=marks)


@pytest.mark.parametrize(("sizes", "name"), list(on_meshes()))
def test_over_a_mesh_equals_one_device(sizes: dict[str, int], name: str, rng: np.random.Generator) -> None:
    cfg = replace(PLAIN, dispatch=DISPATCHES[name], router=replace(ROUTER, bias_balance=True))
    params, given_batch = random_params(cfg, rng), batch(rng)
    want = run(abstract(cfg)[0], params, *given_batch, True)
    mesh = make_mesh(config.Mesh(**sizes))
    with jax.set_mesh(mesh):
        graphdef, like = abstract.__wrapped__(cfg)
        rows = NamedSharding(mesh, spec("batch"))
        placed = jax.tree.map(lambda a, at: jax.device_put(a, NamedSharding(mesh, at.sharding.spec)), params, like)
        got = run(graphdef, placed, *jax.device_put(given_batch, rows), True)
    check(got, want)


@pytest.mark.parametrize("exchange", ["ragged", "padded"])
def test_what_does_not_fit_a_buffer_is_dropped_and_counted(
    exchange: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridlm.ffns.moe.exchange.SMALLEST_BUFFER", 8)
    cfg = replace(PLAIN, dispatch=config.Dropless(exchange=exchange, buffer_factor=0.5), router=replace(ROUTER, k=2))
    params, (x, segments, cotangent) = random_params(cfg, rng), batch(rng)
    x[..., 0] = 1.0
    params["router"]["gate"]["w"][0, 5] = 3.0  # most tokens want this expert
    want_y = np.asarray(run(abstract(cfg)[0], params, x, segments, cotangent, True)[1][0])
    mesh = make_mesh(config.Mesh(data=1, expert=8))
    with jax.set_mesh(mesh):
        graphdef, like = abstract.__wrapped__(cfg)
        rows = NamedSharding(mesh, spec("batch"))
        placed = jax.tree.map(lambda a, at: jax.device_put(a, NamedSharding(mesh, at.sharding.spec)), params, like)
        _, (y, aux) = outputs_of(graphdef, placed, *jax.device_put((x, segments, cotangent), rows))
    kept = brute_force(cfg, params, x, segments, exchange)
    dropped = 1 - kept[segments.ids != 0].mean()
    assert 0.1 < dropped < 0.9
    assert float(aux["moe_dropped"]) == pytest.approx(dropped)
    whole = kept.all(axis=-1)
    np.testing.assert_allclose(np.asarray(y)[whole], want_y[whole], rtol=1e-4, atol=1e-5)
    assert distance(np.asarray(y)[~whole], want_y[~whole]) > 0.1


def outputs_of(*args: Any) -> Any:
    return jax.jit(outputs, static_argnums=(0, 5))(*args, True)


def brute_force(cfg: config.MoE, params: Any, x: np.ndarray, segments: Segments, exchange: str) -> np.ndarray:
    """Which choices [b t k] find room where every device holds one row of the batch and one expert."""
    logits = x @ params["router"]["gate"]["w"]
    k = cfg.router.k
    experts = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    kept = np.zeros((B, T, k), bool)
    fair_share = T * k if exchange == "ragged" else math.ceil(T * k / 8)
    buffer = 8 * math.ceil(0.5 * fair_share / 8)
    for expert in range(X):
        room = buffer
        for sender in range(B):
            if exchange == "padded":
                room = buffer
            for t, j in np.ndindex(T, k):
                if segments.ids[sender, t] and experts[sender, t, j] == expert:
                    kept[sender, t, j] = room > 0
                    room -= 1
    kept[segments.ids == 0] = True
    return kept


def test_outside_training_capacity_drops_nothing(rng: np.random.Generator) -> None:
    params, (x, segments, _) = jax.tree.map(jnp.asarray, (random_params(PLAIN, rng), batch(rng)))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def forward(dispatch: config.Dispatch, training: bool) -> Any:
        graphdef, _ = abstract(replace(PLAIN, dispatch=dispatch))
        y, aux, _ = nnx.merge(graphdef, params)(x, segments, {}, given(training))
        return y, aux["moe_dropped"]

    scarce = config.Capacity(factor=0.1)
    y, dropped = forward(scarce, False)
    np.testing.assert_array_equal(y, forward(config.Dropless(), False)[0])
    assert float(dropped) == 0.0
    assert float(forward(scarce, True)[1]) > 0.5


def test_slices_exchange_within_themselves_and_then_across(rng: np.random.Generator) -> None:
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    of_device = PartitionSpec("expert")
    rows = jax.device_put(rng.normal(size=(4, 4)), NamedSharding(mesh, of_device))  # from, to
    exchange = jax.shard_map(
        lambda row: all_to_all(row[0], 2)[None], mesh=mesh, in_specs=of_device, out_specs=of_device
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(exchange).lower(rows)
    assert re.findall(r"replica_groups = dense<(.*?)>", lowered.as_text()) == ["[[0, 1], [2, 3]]", "[[0, 2], [1, 3]]"]
    np.testing.assert_array_equal(lowered.compile()(rows), np.asarray(rows).T)


def test_flops_and_parameters_count_the_experts_of_a_token() -> None:
    cfg = replace(PLAIN, shared_hidden=9, shared_gate=True)
    router = ROUTERS.module_of(cfg.router).flops(cfg.router, X, CONTEXT)
    mlp = GatedMLP.flops(config.SwiGLU(hidden=3 * 10 + 9), CONTEXT)
    assert MoE.flops(cfg, CONTEXT) == router + mlp + 2 * D
    experts = sum(math.prod(a.shape) for a in jax.tree.leaves(abstract(cfg)[1]["experts"]))
    assert MoE.idle_parameters(cfg, CONTEXT) == experts * (X - 3) // X
