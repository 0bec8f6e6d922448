"""A model with memories in the training step: rows that are read, and no others, move as a dense gradient says.

Letters: b batch, t time, n rows of a table, v row width.
"""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.ffns.base import Pass
from hybridlm.ffns.memory import table as memory_table
from hybridlm.ffns.memory.table import LAYOUTS
from hybridlm.mixers.base import Segments
from hybridlm.model import build
from hybridlm.optim import make_optimizer
from hybridlm.sharding import make_mesh, spec
from hybridlm.train.step import init_state, make_train_step
from hybridlm.train.tables import tables_of, with_tables

ROWS, LENGTH, WIDTH = 8, 12, 16
PLUS = config.MemoryPlus(num_rows=256, top_k=4, num_heads=2, key_dim=8, value_dim=1024)
NEURONS = config.PEER(num_rows=64, top_k=3, num_heads=2, key_dim=8, query_norm="layer")
ADAM = config.AdamW(
    peak_lr=1e-2, schedule=config.Cosine(warmup_steps=0), tables=config.RowAdam(multiplier=4.0, final_multiplier=1.0)
)
ADAGRAD = replace(ADAM, tables=config.RowAdagrad(lr=0.5))


def model_of(ffn: config.FFN, num_layers: int = 2) -> config.Model:
    """Layers of one kind, scanned."""
    mixer = config.RGLRU(width=16, num_heads=2)
    return config.Model(
        vocab_size=64, width=WIDTH, num_layers=num_layers, pattern=(config.Block(mixer=mixer, ffn=ffn),)
    )


def batch_of(rng: np.random.Generator, rows: int = ROWS) -> dict[str, jax.Array]:
    """The last three tokens of every row are padding."""
    tokens = rng.integers(1, 64, (rows, LENGTH)).astype(np.int32)
    ids = np.ones_like(tokens)
    ids[:, -3:] = 0
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    arrays = {"tokens": tokens, "targets": tokens, "segment_ids": ids, "positions": positions, "target_bytes": ids}
    return {name: jnp.asarray(x) for name, x in arrays.items()} | {"loss_weight": jnp.asarray(ids, jnp.float32)}


def run(
    model: config.Model,
    optimizer: config.AdamW,
    batches: list[dict[str, jax.Array]],
    num_microbatches: int = 1,
) -> tuple[list[Any], list[dict[str, Any]]]:
    """The states before the first step and after each, on the host, and the metrics."""
    train = config.Train(steps=5, batch_size=ROWS, num_microbatches=num_microbatches)
    init, bind = build(model, config.Kernels())
    transformation, schedule = make_optimizer(optimizer, train.steps)
    state = jax.jit(partial(init_state, init, transformation, 0, optimizer.tables))()
    step = make_train_step(bind, transformation, schedule, train, optimizer.tables)
    states, records = [jax.tree.map(np.asarray, state)], []
    for batch in batches:
        state, metrics = step(state, batch)
        states.append(jax.tree.map(np.asarray, state))
        records.append({name: value.tolist() for name, value in metrics.items()})
    return states, records


def dense_gradients(model: config.Model, params: Any, batch: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Of the mean loss over real tokens in the tables, by autodiff through whole tables."""
    _, bind = build(model, config.Kernels())

    def objective(params: Any) -> jax.Array:
        lm = bind(params)
        segments = Segments(batch["segment_ids"], batch["positions"])
        x, _, aux = lm.features(batch["tokens"], segments, step=jnp.int32(0), key=jax.random.key(0))
        logits = lm.logits(x)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
        losses = sum((jnp.sum(value) for name, value in aux.items() if name.endswith("_loss")), jnp.zeros(()))
        return losses - jnp.sum(chosen * batch["loss_weight"]) / jnp.sum(batch["loss_weight"])

    return {name: np.asarray(g, np.float64) for name, g in tables_of(jax.jit(jax.grad(objective))(params)).items()}


@pytest.mark.parametrize(
    ("ffn", "num_microbatches"),
    [
        pytest.param(PLUS, 1, id="MemoryPlus", marks=pytest.mark.slow),
        pytest.param(PLUS, 2, id="MemoryPlus, microbatches"),
        pytest.param(NEURONS, 1, id="PEER"),
    ],
)
def test_rows_that_are_read_move_by_adagrad_of_the_dense_gradient(
    ffn: config.FFN, num_microbatches: int, rng: np.random.Generator
) -> None:
    model, batch = model_of(ffn), batch_of(rng)
    (before, after), (record,) = run(model, ADAGRAD, [batch], num_microbatches)
    grads = dense_gradients(model, before.params, batch)
    assert set(grads) == set(tables_of(before.params)) != set()
    for name, g in grads.items():
        table, new = (tables_of(state.params)[name] for state in (before, after))
        read = np.any(g != 0, axis=(1, 2))
        assert 0 < read.sum() < len(read)
        np.testing.assert_array_equal(new[~read], table[~read])
        want = table - 0.5 * g / (np.sqrt(np.mean(g**2, axis=(1, 2), keepdims=True)) + 1e-8) * read[:, None, None]
        np.testing.assert_allclose(new, want, rtol=1e-3, atol=2e-4)
        np.testing.assert_allclose(after.table_states[name]["sum"], np.mean(g**2, axis=(1, 2)), rtol=1e-3, atol=1e-12)
    assert all(0 < used < 1 for used in record["layers/memory_used"])


def test_adam_goes_on_where_it_was_and_has_its_own_rate(rng: np.random.Generator) -> None:
    model, batches = model_of(PLUS, 1), [batch_of(rng) for _ in range(3)]
    states, records = run(model, ADAM, batches)
    (name,) = tables_of(states[0].params)
    m = v = np.zeros_like(tables_of(states[0].params)[name], np.float64)
    for i, batch in enumerate(batches):
        g = dense_gradients(model, states[i].params, batch)[name]
        read = np.any(g != 0, axis=(1, 2))[:, None, None]
        m, v = np.where(read, 0.9 * m + 0.1 * g, m), np.where(read, 0.95 * v + 0.05 * g**2, v)
        rate = records[i]["lr"] * (4.0 + (1.0 - 4.0) * i / 4)
        step = rate * (m / (1 - 0.9 ** (i + 1))) / (np.sqrt(v / (1 - 0.95 ** (i + 1))) + 1e-8)
        old, new = (tables_of(states[j].params)[name] for j in (i, i + 1))
        moved = np.linalg.norm(new - (old - np.where(read, step, 0))) / np.linalg.norm(new - old)
        assert moved < 2e-2  # first steps are signs, which the noise of float32 turns where a gradient is 0 or nearly


MESHES = [
    ("rows", config.Mesh(data=1, fsdp=8)),
    ("grid", config.Mesh(data=1, fsdp=2, expert=2, tensor=2)),
]
MORE_MESHES = [
    ("columns", config.Mesh(data=2, fsdp=4)),
    ("rows", config.Mesh(data=1, fsdp=2)),
    ("rows", config.Mesh(data=2, fsdp=2, expert=2)),
    ("columns", config.Mesh(data=1, fsdp=2)),
    ("columns", config.Mesh(data=1, fsdp=4, expert=2)),
    ("rows", config.Mesh(data=2, fsdp=2, tensor=2)),
    ("columns", config.Mesh(data=1, fsdp=4, tensor=2)),
    ("grid", config.Mesh(data=1, fsdp=4, expert=2)),
    ("auto", config.Mesh(data=2, fsdp=2, tensor=2)),
]


@pytest.mark.parametrize(
    ("spread", "mesh"), [*MESHES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_MESHES)], ids=str
)
def test_every_spread_over_devices_equals_one_device(spread: str, mesh: config.Mesh, rng: np.random.Generator) -> None:
    model, batches = model_of(replace(PLUS, spread=spread)), [batch_of(rng) for _ in range(2)]  # pyright: ignore
    (*_, want), want_records = run(model, ADAGRAD, batches)
    num_devices = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:num_devices])):
        rows = spec("batch")
        placed = [
            jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), rows)), b)
            for b in batches
        ]
        (*_, got), records = run(model, ADAGRAD, placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3 * max(np.abs(b).max(), 1e-6))
    for name in ("loss", "aux/memory_used", "aux/memory_kl"):
        assert records[-1][name] == pytest.approx(want_records[-1][name], rel=1e-4)


def test_tables_are_shared_as_the_config_says() -> None:
    def rows(ffn: config.Memory) -> list[int]:
        init, _ = build(model_of(ffn, 4), config.Kernels())
        return [table.shape[0] for table in tables_of(jax.eval_shape(lambda: init(jax.random.key(0)))).values()]

    assert rows(PLUS) == [256]
    assert rows(replace(PLUS, num_tables=2)) == [512]
    assert rows(replace(PLUS, num_tables=None)) == [1024]
    assert rows(NEURONS) == [256, 256]


def test_layers_read_their_own_tables(rng: np.random.Generator) -> None:
    """With two tables for four layers, the first two layers read the first, the others the second."""
    model, batch = model_of(replace(PLUS, num_tables=2), 4), batch_of(rng)
    (before, after), (record,) = run(model, ADAGRAD, [batch])
    (name,) = tables_of(before.params)
    moved = np.any(tables_of(after.params)[name] != tables_of(before.params)[name], axis=(1, 2))
    used = [moved[:256].mean(), moved[256:].mean()]
    assert record["layers/memory_used"] == pytest.approx(used)
    assert record["aux/memory_used"] == pytest.approx(np.mean(used))


def test_a_step_that_is_not_finite_leaves_tables_and_their_states(rng: np.random.Generator) -> None:
    model, batch = model_of(PLUS, 1), batch_of(rng)
    bad = batch | {"loss_weight": batch["loss_weight"].at[0, 0].set(jnp.nan)}
    (_, before, after), records = run(model, ADAM, [batch, bad])
    assert records[-1]["nonfinite_total"] == 1
    for part in ("params", "opt_state", "table_states"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))


def test_what_is_held_is_added_where_it_is_awaited(rng: np.random.Generator) -> None:
    """Three blocks by hand: the second adds nothing of the first's memory, the third all of it."""
    mlp, mixer = config.SwiGLU(hidden=24), config.RGLRU(width=16, num_heads=2)
    ffns = (config.Beside(ffn=mlp, memory=PLUS, held=True), mlp, config.AddHeld(ffn=mlp))
    blocks = tuple(config.Block(mixer=mixer, ffn=ffn) for ffn in ffns)
    model = replace(model_of(mlp, 3), pattern=blocks)
    init, bind = build(model, config.Kernels())
    params = init(jax.random.key(0))
    tokens = jnp.asarray(rng.integers(1, 64, (2, LENGTH)), jnp.int32)
    lm = bind(params)
    segments = Segments(jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape))
    given = Pass(tokens, shared=dict(lm.shared))
    x = lm.embedding[...][tokens] * WIDTH**0.5
    blocks_of = jax.tree.map(lambda a: a[0], lm.stack.repeats)
    held = jnp.zeros_like(x)
    for i, block in enumerate(blocks_of):
        y, _, _ = block.mixer(block.mixer_norm(x), segments, None, {})
        x = x + y
        z = block.ffn_norm(x)
        x = x + block.ffn.ffn(z, segments, {}, given)[0] if i != 1 else x + block.ffn(z, segments, {}, given)[0]
        if i == 0:
            held, _, _ = block.ffn.memory(z, segments, {}, given)
        if i == 2:
            x = x + held
    assert float(jnp.abs(held).max()) > 1e-3
    np.testing.assert_allclose(lm.features(tokens, segments)[0], lm.norm(x), rtol=1e-4, atol=1e-5)


def test_decoding_reads_no_other_row_than_those_that_are_found(rng: np.random.Generator) -> None:
    """All rows that the whole sequence does not ask for are NaN; nothing of the table's size is computed."""
    model = model_of(replace(PLUS, num_rows=4096, value_dim=128))
    init, bind = build(model, config.Kernels())
    params = init(jax.random.key(0))
    tokens = jnp.asarray(rng.integers(1, 64, (1, LENGTH)), jnp.int32)
    segments = Segments(jnp.ones_like(tokens), jnp.arange(LENGTH)[None])
    lm = bind(params)
    _, _, aux = lm.features(tokens, segments, taps=lm.taps(1, LENGTH))
    (record,) = aux["recorded"]["repeats"]
    (name,) = tables_of(params)
    asked = np.unique(record[f"recorded/{name}/indices"])
    assert 0 < len(asked) < 200
    table = np.full_like(tables_of(params)[name], np.nan)
    table[asked] = tables_of(params)[name][asked]
    poisoned = with_tables(params, {name: jnp.asarray(table)})
    state = lm.init_state(1, LENGTH)
    decode = jax.jit(lambda params, token, state: bind(params)(token, None, state)).lower(params, tokens[:, :1], state)
    compiled = decode.compile()
    results = re.findall(r"= f32\[4096,1?,?128\]\S* ([\w-]+)\(", compiled.as_text())
    assert set(results) <= {"parameter", "get-tuple-element", "bitcast"}
    want, _ = lm(tokens)
    for t in range(LENGTH):
        logits, state = compiled(poisoned, tokens[:, t : t + 1], state)
        np.testing.assert_allclose(logits[:, 0], want[:, t], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ("read", "what the last Beside with held=True reads is added nowhere"),
        ("add", "layer 0 has AddHeld, but no Beside with held=True comes before it"),
        ("read read add", "layer 1 reads while what was read before waits"),
    ],
)
def test_reads_that_are_not_added_are_refused(order: str, problem: str) -> None:
    mlp = config.SwiGLU(hidden=24)
    ffns = {"read": config.Beside(ffn=mlp, memory=PLUS, held=True), "add": config.AddHeld(ffn=mlp)}
    blocks = tuple(config.Block(mixer=config.RGLRU(width=16, num_heads=2), ffn=ffns[word]) for word in order.split())
    with pytest.raises(ConfigError, match=problem):
        config.Model(vocab_size=64, width=WIDTH, num_layers=len(blocks), pattern=blocks)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: config.PEER(num_rows=1000), "num_rows=1000: must be a square, as 961 or 1024"),
        (lambda: config.ProductKeyMemory(num_rows=64, top_k=9), "top_k=9: must be at most the 8 half keys"),
        (lambda: config.UltraMem(num_rows=64, top_k=17), "top_k=17: must be at most the 16 half keys"),
        (lambda: config.UltraMem(expansion=3), "expansion=3: must be a square"),
        (lambda: config.PEER(key_dim=7), "key_dim=7: must be even"),
        (lambda: config.RowAdagrad(lr=1e-3, multiplier=2.0), "lr=0.001: is constant"),
    ],
)
def test_wrong_configs_are_refused(make: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        make()
    assert str(refusal.value).startswith(problem)


@pytest.mark.parametrize(
    ("mesh", "dtype", "want"),
    [
        ({"fsdp": 8}, "float32", "columns"),  # 1,024 columns are eight blocks
        ({"fsdp": 8}, "bfloat16", "grid"),  # whose columns are then whole
        ({"fsdp": 4}, "bfloat16", "columns"),
        ({"fsdp": 4, "expert": 2}, "bfloat16", "grid"),
    ],
    ids=str,
)
def test_auto_receives_least_of_what_divides(mesh: dict[str, int], dtype: Any, want: str) -> None:
    memory = replace(PLUS, spread="auto", table_dtype=dtype)
    sizes = config.Mesh(**{"data": 1} | mesh)
    with jax.set_mesh(make_mesh(sizes, jax.devices()[: sizes.fsdp * sizes.expert])):
        _, bind = build(model_of(memory), config.Kernels())
        init, _ = build(model_of(memory), config.Kernels())
        (table,) = bind(jax.eval_shape(lambda: init(jax.random.key(0)))).shared.values()
        assert (table.row_axis, table.column_axis) == LAYOUTS[want]


def test_a_table_that_does_not_divide_is_refused() -> None:
    with jax.set_mesh(make_mesh(config.Mesh(data=1, fsdp=8))), pytest.raises(ConfigError) as refusal:
        build(model_of(replace(PLUS, value_dim=128, spread="columns")), config.Kernels())
    assert "a memory's table of 256 rows in 1 blocks of columns must divide by the 1 x 8 devices" in str(refusal.value)


def test_more_reads_than_can_be_counted_are_refused(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_table, "MAX_READS", 1000)
    with pytest.raises(ConfigError, match=r"train.batch_size: [\d,]+ reads of a memory in one step .* a smaller batch"):
        run(model_of(PLUS), ADAGRAD, [batch_of(rng)])
