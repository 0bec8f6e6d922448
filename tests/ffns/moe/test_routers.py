"""What holds for every registered router at every example.

Letters: b batch, t time, n tokens (b t), d model width, x experts, k experts per token.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.ffns.base import Pass
from hybridlm.ffns.moe.gates import GATES
from hybridlm.ffns.moe.routers import ROUTERS
from hybridlm.ffns.moe.routing import Routing, Tokens, statistics
from hybridlm.mixers.base import Context
from hybridlm.sharding import make_mesh, per_device

B, T, D, X = 8, 7, 20, 6
CONTEXT = Context(width=D, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())
KEY = jax.random.key(7)

CONFIGS = [(cfg, f"{type(cfg).__name__}{i}") for e in ROUTERS.entries.values() for i, cfg in enumerate(e.examples)]
CONFIGS += [
    (config.TopK(gate=cfg), f"TopK-{type(cfg).__name__}{i}")
    for e in GATES.entries.values()
    for i, cfg in enumerate(e.examples)
]
# Further examples of a router or gate run in the slow stage: compiling is what takes long.
examples = pytest.mark.parametrize(
    "cfg",
    [pytest.param(cfg, id=name, marks=() if name.endswith("0") else pytest.mark.slow) for cfg, name in CONFIGS],
)
modes = pytest.mark.parametrize("key", [pytest.param(KEY, id="training"), pytest.param(None, id="inference")])


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((B, T, D)).astype(np.float32)


def padding(rng: np.random.Generator) -> np.ndarray:
    real = rng.random((B, T)) < 0.7
    real[0], real[1] = False, True
    return real


def draws_noise(cfg: config.Router) -> bool:
    """Per token, in training."""
    if isinstance(cfg, config.PreGated):
        return draws_noise(cfg.router)
    return (
        isinstance(cfg, config.NoisyTopK)
        or (isinstance(cfg, config.Switch) and cfg.jitter > 0.0)
        or (isinstance(cfg, config.GShardTop2) and cfg.random_second)
        or (isinstance(cfg, config.DenseToSparse) and cfg.activation == "identity")
    )


@modes
@examples
def test_a_routing_is_in_order(build: Any, cfg: config.Router, key: Any, rng: np.random.Generator) -> None:
    real = padding(rng)
    routing, losses, _ = build(cfg, X)(inputs(rng), real, key=key, step=20)
    experts, weights = np.asarray(routing.experts), np.asarray(routing.weights)
    assert weights.dtype == np.float32 and experts.dtype == np.int32
    assert experts.shape == weights.shape and len(experts) == B * T
    assert experts.shape[1] <= ROUTERS.module_of(cfg).slots(cfg, X)
    assert experts.min() >= 0 and experts.max() <= X
    assert (weights[experts == X] == 0.0).all() and (weights[experts < X] > 0.0).all()
    assert (experts[~real.reshape(-1)] == X).all()
    for row in experts:
        chosen = row[row < X]
        assert len(set(chosen)) == len(chosen)
    for name, loss in losses.items():
        assert name.startswith("moe_") and name.endswith("_loss")
        assert loss.shape == () and np.isfinite(loss)


@examples
def test_every_real_token_has_an_expert(build: Any, cfg: config.Router, rng: np.random.Generator) -> None:
    real = padding(rng)
    routing, _, _ = build(cfg, X)(inputs(rng), real)
    np.testing.assert_array_equal((np.asarray(routing.experts) < X).any(axis=1), real.reshape(-1))


@modes
@examples
def test_what_is_in_the_padding_changes_nothing(
    build: Any, cfg: config.Router, key: Any, rng: np.random.Generator
) -> None:
    router, x, real = build(cfg, X), inputs(rng), padding(rng)
    other = np.where(real[:, :, None], x, 9.0 * inputs(rng))
    routing, losses, _ = router(x, real, key=key, step=20)
    again, losses_again, _ = router(other, real, key=key, step=20)
    np.testing.assert_array_equal(routing.experts, again.experts)
    np.testing.assert_array_equal(routing.weights, again.weights)
    for name, loss in losses.items():
        np.testing.assert_allclose(loss, losses_again[name], rtol=1e-6)


@examples
def test_padding_is_in_no_loss(build: Any, cfg: config.Router, rng: np.random.Generator) -> None:
    """Sequences that are all padding could as well not be there."""
    router, x = build(cfg, X), inputs(rng)
    real = np.arange(B)[:, None] < np.full((B, T), 5)
    _, losses, _ = router(x, real)
    _, expected, _ = router(x[:5], real[:5])
    for name, loss in expected.items():
        np.testing.assert_allclose(losses[name], loss, rtol=1e-5)


@examples
def test_only_noise_differs_between_keys(build: Any, cfg: config.Router, rng: np.random.Generator) -> None:
    router, x = build(cfg, X), inputs(rng)
    weights = [np.asarray(router.dense(router(x, key=jax.random.key(seed), step=2)[0])) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(weights[0], weights[1])
    searches = isinstance(cfg, config.Comet) and cfg.search_steps > 0
    assert (weights[0] != weights[2]).any() == (draws_noise(cfg) or searches)


@examples
def test_layers_differ_in_noise_and_hashes(build: Any, cfg: config.Router, rng: np.random.Generator) -> None:
    router, x = build(cfg, X), inputs(rng)
    weights = [np.asarray(router.dense(router(x, key=KEY, step=2, layer=layer)[0])) for layer in (0, 3)]
    searches = isinstance(cfg, config.Comet) and cfg.search_steps > 0
    assert (weights[0] != weights[1]).any() == (draws_noise(cfg) or searches or isinstance(cfg, config.HashRouter))


@examples
def test_huge_inputs_and_batches_of_padding_keep_gradients_finite(
    build: Any, cfg: config.Router, rng: np.random.Generator
) -> None:
    router, x, c = build(cfg, X), inputs(rng), rng.standard_normal((B * T, 1)).astype(np.float32)
    _, real, told, carry = router.inputs(x, key=KEY, step=20)

    @jax.jit
    def gradients(params: Any, x: Any, real: Any) -> Any:
        def objective(params: Any, x: Any) -> Any:
            routing, losses, _ = router.jitted(params, router.shared, x, real, told, carry)
            return jnp.sum(routing.weights * c) + sum(losses.values())

        return jax.value_and_grad(objective, argnums=(0, 1))(params, x)

    for tokens, mask in ((200.0 * x, real), (x, jnp.zeros_like(real))):
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients(router.params, jnp.asarray(tokens), mask)))


@examples
def test_a_sharded_batch_is_routed_as_on_one_device(build: Any, cfg: config.Router, rng: np.random.Generator) -> None:
    """In training, but for routers of which devices draw different noise."""
    key = None if draws_noise(cfg) else KEY
    assert_sharding_changes_nothing(build(cfg, X), config.Mesh(data=2, expert=4), key, rng)


@pytest.mark.parametrize("cfg", [config.TopK(k=3, score="sigmoid", bias_balance=True), config.DSelectK()], ids=repr)
def test_devices_with_the_same_tokens_count_once(build: Any, cfg: config.Router, rng: np.random.Generator) -> None:
    """Those along the tensor axis, also in the loads that balance experts by a bias."""
    assert_sharding_changes_nothing(build(cfg, X), config.Mesh(data=2, expert=2, tensor=2), KEY, rng)


def assert_sharding_changes_nothing(router: Any, mesh: config.Mesh, key: Any, rng: np.random.Generator) -> None:
    """Neither choices, weights, losses and what is carried, nor the gradients of the replicated parameters."""
    cotangent = rng.standard_normal((B * T, 1)).astype(np.float32)
    ids = rng.integers(0, 50, (B, T)).astype(np.int32)
    x, real, told, carry = router.inputs(inputs(rng), padding(rng), key=key, step=20, ids=ids)
    rows = ("batch",)
    carried = jax.tree.map(lambda a: rows if jnp.ndim(a) else (), carry)
    axes = {"tokens": rows, "layer": (), "key": (), "step": ()}

    def routed(params: Any, shared: Any, x: Any, real: Any, told: Any, carry: Any) -> Any:
        tokens = Tokens(x.reshape(-1, D), real.reshape(-1), T)
        return nnx.merge(router.graphdef, params)(tokens, carry, Pass(shared=shared, **told))

    def objective(params: Any, *rest: Any) -> Any:
        f = per_device(routed, in_axes=((), (), rows, rows, axes, carried), out_axes=(rows, (), carried))
        result = f(params, *rest)
        return jnp.sum(result[0].weights * cotangent) + 10.0 * sum(result[1].values()), result

    args = router.params, router.shared, x, real, told, carry
    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(*args)
    with jax.set_mesh(make_mesh(mesh)):
        (_, result), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(*args)
    np.testing.assert_array_equal(result[0].experts, expected[0].experts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected_gradient)


@pytest.mark.parametrize("cfg", [config.NoisyTopK(k=2), config.Switch(), config.DenseToSparse()], ids=repr)
def test_devices_draw_different_noise(build: Any, cfg: config.Router, rng: np.random.Generator) -> None:
    router = build(cfg, X)
    x, real, told, carry = router.inputs(np.tile(inputs(rng)[:1], (B, 1, 1)), key=KEY, step=2)

    def routed(params: Any, x: Any, real: Any, told: Any) -> Routing:
        tokens = Tokens(x.reshape(-1, D), real.reshape(-1), T)
        return nnx.merge(router.graphdef, params)(tokens, {}, Pass(**told))[0]

    rows = ("batch",)
    axes = {"tokens": rows, "layer": (), "key": (), "step": ()}
    with jax.set_mesh(make_mesh(config.Mesh(data=2, expert=4))):
        f = per_device(routed, in_axes=((), rows, rows, axes), out_axes=rows)
        routing = jax.jit(f)(router.params, x, real, told)
    by_device = np.asarray(routing.weights).reshape(B, -1)
    assert len(np.unique(by_device, axis=0)) == B


def test_statistics_tell_how_even_choices_are(rng: np.random.Generator) -> None:
    experts = np.array([[0, 1], [0, 2], [0, 4], [0, 4]])  # of 4; 4 is none
    real = np.array([True, True, True, False])
    got = statistics(jnp.asarray(np.where(real[:, None], experts, 4)), jnp.asarray(real), 4)
    share = np.array([3, 1, 1, 0]) / 5
    entropy = -np.sum(share[:3] * np.log(share[:3])) / np.log(4)
    expected = {
        "moe_max_load": 4 * 3 / 5,
        "moe_min_load": 0.0,
        "moe_load_entropy": entropy,
        "moe_experts_per_token": 5 / 3,
    }
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6)


@examples
def test_counts_are_of_numbers_that_can_be(cfg: config.Router) -> None:
    module = ROUTERS.module_of(cfg)
    assert 1.0 <= module.experts_per_token(cfg, X) <= module.slots(cfg, X) <= X
    assert module.flops(cfg, X, CONTEXT) >= 0


def test_flops_are_those_of_the_matmuls() -> None:
    def flops(cfg: config.Router) -> int:
        return ROUTERS.module_of(cfg).flops(cfg, X, CONTEXT)

    assert flops(config.TopK()) == 2 * D * X
    assert flops(config.NoisyTopK()) == 2 * 2 * D * X
    assert flops(config.HashRouter()) == 0
    assert flops(config.DSelectK(k=2)) == 2 * D * 2 * (3 + 1)
    assert flops(config.Comet(k=2)) == 2 * D * 2 * (5 + 6)
    assert flops(config.TopK(gate=config.RecurrentGate(state_dim=12))) == 2 * (D * 12 + 6 * 12 * 12 + 12 * X)
    splines = 1 + 5 + 3  # and the base
    kan = D * 6 * splines + 6 * 6 * splines
    assert flops(config.TopK(gate=config.GRKANGate(hidden=6))) == 2 * (kan + 2 * 6 * D + D * X)
    assert flops(config.PreGated(router=config.Switch())) == 2 * D * X


@pytest.mark.parametrize(
    ("cfg", "num_experts", "path"),
    [
        (config.TopK(k=5), 4, "k"),
        (config.TopK(num_groups=3), 4, "num_groups"),
        (config.TopK(k=3, num_groups=4, top_groups=1), 8, "k"),
        (config.NoisyTopK(k=4), 4, "k"),
        (config.GShardTop2(), 1, "gate"),
        (config.HashRouter(k=5), 4, "k"),
        (config.DenseToSparse(max_experts=5), 4, "max_experts"),
        (config.DSelectK(k=5), 4, "k"),
        (config.DSelectK(k=1), 1, "k"),
        (config.Comet(k=1), 1, "k"),
        (config.AdaptiveTopK(), 1, "threshold"),
        (config.PreGated(router=config.TopK(k=5)), 4, "router.k"),
    ],
    ids=str,
)
def test_too_few_experts_are_an_error_at_the_field(cfg: config.Router, num_experts: int, path: str) -> None:
    with pytest.raises(ConfigError) as error:
        cfg.check_experts(num_experts)
    assert error.value.path == path


@pytest.mark.parametrize(
    ("cfg", "num_layers", "path"),
    [
        (config.ExpertChoice(), 4, "leaks_future"),
        (config.PreGated(), 1, "router"),
        (config.PreGated(router=config.ExpertChoice()), 4, "router.leaks_future"),
    ],
    ids=str,
)
def test_what_the_stack_lacks_is_an_error_at_the_field(cfg: config.Router, num_layers: int, path: str) -> None:
    with pytest.raises(ConfigError) as error:
        cfg.check_stack(((cfg, 4),), num_layers)
    assert error.value.path == path


def test_pregated_layers_must_be_alike() -> None:
    first, second = config.PreGated(), config.PreGated(router=config.Switch())
    with pytest.raises(ConfigError, match="same router"):
        first.check_stack(((first, 4), (second, 4)), 4)
    with pytest.raises(ConfigError, match="same router"):
        first.check_stack(((first, 4), (first, 8)), 4)
    first.check_stack(((first, 4), (config.TopK(), 8)), 4)


def test_wrong_fields_are_errors() -> None:
    with pytest.raises(ConfigError, match="top_groups=3"):
        config.TopK(num_groups=2, top_groups=3)
    with pytest.raises(ConfigError, match="cannot hold another"):
        config.PreGated(router=config.PreGated())
    with pytest.raises(ConfigError, match="capacity_factor"):
        config.ExpertChoice(capacity_factor=0.0)
    with pytest.raises(ConfigError, match="score"):
        config.TopK(score="relu")  # pyright: ignore[reportArgumentType]
