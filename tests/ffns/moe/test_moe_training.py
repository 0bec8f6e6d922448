"""A model with experts in the training loop: balance, schedules, noise, accumulation, meshes, wrong configs."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.ffns.base import Pass
from hybridlm.ffns.moe.routers import ROUTERS
from hybridlm.ffns.moe.routing import Tokens, expert_counts
from hybridlm.mixers.base import Context, Segments
from hybridlm.model import build
from hybridlm.optim import derivatives, make_optimizer
from hybridlm.train.derived import prepared
from hybridlm.train.loop import describe, train
from hybridlm.train.step import init_state, make_train_step

EXPERTS = config.MoE(num_experts=4, hidden=16, router=config.TopK(k=2, bias_balance=True, balance_loss=0.0))


def with_experts(tiny: config.Config, **changes: Any) -> config.Config:
    """`tiny` with experts in every layer that had an MLP."""
    ffn = replace(EXPERTS, **changes)
    pattern = tuple(replace(block, ffn=block.ffn and ffn) for block in tiny.model.pattern)
    return replace(tiny, model=replace(tiny.model, pattern=pattern))


def batch_of(cfg: config.Config, rng: np.random.Generator, rows: int = 8) -> dict[str, jax.Array]:
    shape = (rows, cfg.data.seq_len)
    tokens = rng.integers(1, 200, shape).astype(np.int32)
    ones = np.ones(shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    arrays = {"tokens": tokens, "targets": tokens, "segment_ids": ones, "positions": positions, "target_bytes": ones}
    return {name: jnp.asarray(x) for name, x in arrays.items()} | {"loss_weight": jnp.ones(shape)}


def run_steps(cfg: config.Config, batch: dict[str, jax.Array], steps: int) -> tuple[Any, list[dict[str, Any]]]:
    init, bind = build(cfg.model, cfg.kernels)
    optimizer, schedule = make_optimizer(cfg.optimizer, cfg.train.steps)
    state = jax.jit(partial(init_state, init, optimizer, 0))()
    step = make_train_step(bind, optimizer, schedule, cfg.train)
    records = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        records.append({name: value.tolist() for name, value in metrics.items()})
    return state, records


def test_losses_and_statistics_come_by_layer(tiny_config: config.Config, rng: np.random.Generator) -> None:
    cfg = with_experts(tiny_config, router=config.TopK(k=2, z_loss=0.5))
    _, (record,) = run_steps(cfg, batch_of(cfg, rng), 1)
    for name in ("moe_max_load", "moe_min_load", "moe_load_entropy", "moe_dropped", "moe_z_loss", "moe_balance_loss"):
        assert record[f"aux/{name}"] == pytest.approx(np.mean(record[f"layers/{name}"]), rel=1e-5)
        assert len(record[f"layers/{name}"]) == 2
    assert all(load >= 1 for load in record["layers/moe_max_load"])


def test_biases_move_by_their_rate_towards_balance_and_nothing_else_sees_them(
    tiny_config: config.Config, rng: np.random.Generator
) -> None:
    cfg = with_experts(tiny_config)
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, router_bias_rate=0.125))
    batch = batch_of(cfg, rng)
    state, (record,) = run_steps(cfg, batch, 1)
    bias = np.asarray(state.params["stack"]["repeats"][0]["ffn"]["router"]["balance_bias"])
    assert set(np.abs(bias).ravel()) <= {0.0, np.float32(0.125)}
    assert (bias > 0).any() and (bias < 0).any()


def test_loads_are_no_gradients_to_any_other_parameter() -> None:
    grads = {"w": jnp.full((3,), 0.1), "router": {"balance_bias": jnp.array([900.0, -900.0])}}
    optimizer, _ = make_optimizer(config.AdamW(clip_norm=0.5, router_bias_rate=0.25), 1000)
    silent = jax.tree.map(jnp.zeros_like, grads) | {"w": grads["w"]}
    moved, alone = (optimizer.update(g, optimizer.init(grads), grads)[0] for g in (grads, silent))
    np.testing.assert_array_equal(moved["w"], alone["w"])
    np.testing.assert_array_equal(moved["router"]["balance_bias"], [-0.25, 0.25])
    assert float(optax.tree.norm(derivatives(grads))) == pytest.approx(0.1 * 3**0.5)


def test_biases_balance_a_router_that_is_not(rng: np.random.Generator) -> None:
    """As the optimizer moves them: by the sign of what `report_load` gives for a gradient."""
    context = Context(width=6, num_layers=1, norm_eps=1e-6, dtype=jnp.float32, kernels=config.Kernels())
    router = ROUTERS.module_of(EXPERTS.router)(EXPERTS.router, 8, context, nnx.Rngs(params=jax.random.key(0)))
    graphdef, state = nnx.split(router)
    params = nnx.to_pure_dict(state)
    x = jnp.asarray(rng.normal(size=(256, 6)) + [3.0, 0, 0, 0, 0, 0], jnp.float32)  # one feature decides most
    tokens = Tokens(x, jnp.ones(256, bool), 256)

    @jax.jit
    def step(params: Any) -> tuple[Any, jax.Array]:
        def objective(params: Any) -> tuple[jax.Array, jax.Array]:
            routing, _, _ = nnx.merge(graphdef, params)(tokens, {}, Pass(jnp.zeros((1, 256), jnp.int32)))
            return jnp.sum(routing.weights), expert_counts(routing.experts, 8)

        grads, counts = jax.grad(objective, has_aux=True)(params)
        return params | {"balance_bias": params["balance_bias"] - 0.01 * jnp.sign(grads["balance_bias"])}, counts

    loads = []
    for _ in range(150):
        params, counts = step(params)
        loads.append(int(counts.max()) / 64)
    assert loads[0] > 2
    assert max(loads[-10:]) < 1.4


def test_microbatches_equal_one_batch(tiny_config: config.Config, rng: np.random.Generator) -> None:
    """Without losses of balance, which are of a microbatch's tokens; the biases' moves are of all tokens."""
    cfg = with_experts(tiny_config, router=replace(EXPERTS.router, z_loss=0.0))
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, clip_norm=None))
    parts = replace(cfg, train=replace(cfg.train, num_microbatches=4))
    batch = batch_of(cfg, rng)
    (whole, _), (summed, _) = run_steps(cfg, batch, 1), run_steps(parts, batch, 1)
    for a, b in zip(jax.tree.leaves(whole.opt_state), jax.tree.leaves(summed.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6)
    biases = [state.params["stack"]["repeats"][0]["ffn"]["router"]["balance_bias"] for state in (whole, summed)]
    assert np.any(biases[0])
    np.testing.assert_array_equal(*biases)


def test_noise_differs_by_step_and_layer_and_is_absent_from_evaluation(
    tiny_config: config.Config, rng: np.random.Generator
) -> None:
    cfg = with_experts(tiny_config, router=config.NoisyTopK(k=2))
    init, bind = build(cfg.model, cfg.kernels)
    params, batch = init(jax.random.key(0)), batch_of(cfg, rng)
    segments = Segments(batch["segment_ids"], batch["positions"])

    @jax.jit
    def losses(params: Any, key: Any) -> Any:
        return bind(params).features(batch["tokens"], segments, key=key)[2]["moe_max_load"]

    params = jax.tree.map(lambda a: a + 0.1, params)
    one, same, other = (np.asarray(losses(params, jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    silent = np.asarray(losses(params, None))
    assert not np.array_equal(one, silent)


def test_a_run_tells_how_many_parameters_a_token_uses(
    moe_config: config.Config, tiny_config: config.Config, tmp_path: Path
) -> None:
    """Layer 0 has 4 experts of which a token goes to one, the others 6 of which it goes to two."""

    def description(cfg: config.Config) -> tuple[dict[str, int], str]:
        params = jax.eval_shape(build(cfg.model, cfg.kernels)[0], jax.random.key(0))
        leaves, _ = jax.tree.flatten_with_path(params)
        sizes = {jax.tree_util.keystr(path): math.prod(x.shape) for path, x in leaves}
        return sizes, describe(cfg, *prepared(cfg), {}, params, tmp_path)

    sizes, text = description(moe_config)
    idle = sum(n * (3 / 4 if "prologue" in path else 4 / 6) for path, n in sizes.items() if "['experts']" in path)
    total = sum(sizes.values())
    assert 0 < idle == round(idle)
    assert f"parameters  {total:,} (" in text and f", {total - round(idle):,} of them active per token" in text
    assert "active" not in description(tiny_config)[1]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "expert": 4}, {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}], ids=str)
def test_a_run_over_an_expert_axis_equals_one_on_one_device(
    mesh: dict[str, int], tiny_config: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = with_experts(tiny_config, dispatch=config.Dropless(buffer_factor=None))
    cfg = replace(cfg, train=replace(cfg.train, steps=6), eval=replace(cfg.eval, every=6))
    assert train(replace(cfg, sharding=config.Sharding(mesh=config.Mesh(**mesh))), tmp_path / "many") == 0
    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda: devices()[:1])
    assert train(cfg, tmp_path / "one") == 0
    many, one = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("many", "one")
    )
    for a, b in zip(many, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["layers/moe_max_load"] == pytest.approx(b["layers/moe_max_load"], abs=0.05)
        assert a["aux/moe_dropped"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": {"k": 5}}, "router.k=5: must be at most num_experts=4"),
        ({"dispatch": {"factor": 0.0}}, "factor=0.0: must be above 0"),
        ({"dispatch": {"factor": -1.0}}, "factor=-1.0: must be above 0"),
        ({"num_experts": 0}, "num_experts=0: must be at least 1"),
        ({"shared_gate": True}, "shared_gate=True: needs shared_hidden"),
    ],
)
def test_wrong_layers_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        made = {
            name: (config.TopK if name == "router" else config.Capacity)(**value) if isinstance(value, dict) else value
            for name, value in change.items()
        }
        replace(EXPERTS, **made)
    assert str(error.value) == message


def test_wrong_meshes_and_groups_are_refused_by_name(tiny_config: config.Config) -> None:
    cfg = with_experts(tiny_config)
    with pytest.raises(ConfigError, match=r"^sharding.mesh.expert=3: must divide num_experts=4 of layer 0$"):
        replace(cfg, sharding=config.Sharding(mesh=config.Mesh(expert=3)))
    with pytest.raises(ConfigError, match=r"^data.seq_len=32: must divide by group_size=5 of layer 0$"):
        with_experts(tiny_config, dispatch=config.Capacity(group_size=5))
    cfg = with_experts(tiny_config, dispatch=config.Capacity(slices=4))
    with pytest.raises(ConfigError, match=r"^sharding.mesh.expert=2: must divide by dispatch.slices=4 of layer 0$"):
        replace(cfg, sharding=config.Sharding(mesh=config.Mesh(expert=2)))


def test_routers_that_need_what_the_stack_lacks_are_refused_by_name(tiny_config: config.Config) -> None:
    with pytest.raises(ConfigError, match=r"^pattern.0.ffn.router.leaks_future=False: experts choose among all tokens"):
        with_experts(tiny_config, router=config.ExpertChoice())
    model = with_experts(tiny_config, router=config.PreGated()).model
    with pytest.raises(ConfigError, match=r"^pattern.0.ffn.router.router: needs a layer to choose for"):
        replace(model, num_layers=1)
