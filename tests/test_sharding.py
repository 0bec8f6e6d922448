"""Meshes from config, their errors, and models that compute the same on every mesh of eight devices."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.losses import token_losses
from hybridlm.mixers.base import Segments
from hybridlm.model import build
from hybridlm.sharding import check_batch, constrain, make_mesh, mesh_shape, param, per_device, spec

TIME = 13  # an axis that it divides holds tokens, not parameters
B, T, V, D = 8, 2 * TIME, 64, 16
TOLERANCE = 1e-5  # relative L2, float32 sums in another order

ffn = config.GeGLU(hidden=24)
local = config.Attention(num_heads=8, num_kv_heads=1, head_dim=6, window=5)
MODELS = {
    "griffin": config.Model(
        vocab_size=V,
        width=D,
        num_layers=4,
        pattern=(
            config.Block(mixer=config.RGLRU(width=24, num_heads=8), ffn=ffn),
            config.Block(mixer=local, ffn=None),
        ),
    ),
    "transformer": config.Model(
        vocab_size=V,
        width=D,
        num_layers=2,
        pattern=(config.Block(mixer=config.Attention(num_heads=8, num_kv_heads=8, head_dim=4), ffn=ffn),),
        tied_embedding=False,
    ),
}
MESHES = {
    "griffin": (
        {"data": 8},
        {"tensor": 8},
        {"fsdp": 2, "tensor": 4},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"slices": 2, "fsdp": 2, "context": 2},
    ),
    "transformer": (
        {"fsdp": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"expert": 2, "context": 2, "tensor": 2},
        {"slices": 2, "data": 2, "expert": 2},
    ),
}
MORE_MESHES = {
    "griffin": ({"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2}),
    "transformer": ({"tensor": 8},),
}


def case(name: str, axes: dict[str, int], *marks: pytest.MarkDecorator) -> Any:
    text = " ".join([name, *(f"{axis}={size}" for axis, size in axes.items())])
    return pytest.param(name, config.Mesh(**{"data": 1} | axes), id=text, marks=marks)


CASES = [
    *(case(name, axes) for name, meshes in MESHES.items() for axes in meshes),
    *(case(name, axes, pytest.mark.slow) for name, meshes in MORE_MESHES.items() for axes in meshes),
]


def mesh_config(shape: tuple[int, int, int]) -> config.Mesh:
    return config.Mesh(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))


@pytest.mark.parametrize(
    ("sizes", "num_devices", "want"),
    [
        ((-1, 1, 1), 8, (1, 8, 1, 1, 1, 1)),
        ((2, -1, 2), 8, (1, 2, 2, 1, 1, 2)),
        ((1, 1, -1), 6, (1, 1, 1, 1, 1, 6)),
        ((2, 3, 4), 24, (1, 2, 3, 1, 1, 4)),
        ((-1, 1, 1), 1, (1, 1, 1, 1, 1, 1)),
        ((2, 2, -1), 4, (1, 2, 2, 1, 1, 1)),
    ],
)
def test_one_axis_takes_the_devices_that_are_left(sizes: Any, num_devices: int, want: Any) -> None:
    assert mesh_shape(mesh_config(sizes), num_devices) == want


@pytest.mark.parametrize(
    ("sizes", "num_devices", "message"),
    [
        ((3, -1, 1), 8, "sharding.mesh: data=3, fsdp=-1 needs 3 devices, which must divide the 8 there are"),
        (
            (2, 2, 1),
            8,
            "sharding.mesh: data=2, fsdp=2 needs 4 devices, which must equal the 8 there are",
        ),
        (
            (4, 4, 1),
            8,
            "sharding.mesh: data=4, fsdp=4 needs 16 devices, which must equal the 8 there are",
        ),
        ((16, 1, -1), 8, "needs 16 devices, which must divide the 8 there are; set one axis to -1"),
    ],
)
def test_mesh_that_does_not_fit_is_an_error(sizes: Any, num_devices: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        mesh_shape(mesh_config(sizes), num_devices)


def test_batch_that_does_not_divide_is_an_error() -> None:
    mesh = make_mesh(mesh_config((2, 2, 2)))
    check_batch(run(config.Train(batch_size=8, num_microbatches=2)), mesh)
    with pytest.raises(ConfigError, match=r"^train.batch_size=6: 6 sequences per microbatch must divide by .* = 4 dev"):
        check_batch(run(config.Train(batch_size=6)), mesh)
    with pytest.raises(ConfigError, match=r"^train.batch_size=12: 6 sequences per microbatch"):
        check_batch(run(config.Train(batch_size=12, num_microbatches=2)), mesh)


def run(train: config.Train | None = None, seq_len: int = 16) -> config.Config:
    return config.Config(model=MODELS["griffin"], data=config.Data(seq_len=seq_len), train=train or config.Train())


def test_sequence_that_the_context_does_not_divide_is_an_error() -> None:
    mesh = make_mesh(config.Mesh(data=2, context=4))
    check_batch(run(seq_len=16), mesh)
    with pytest.raises(ConfigError, match=r"^data.seq_len=18: must divide by sharding.mesh.context = 4 devices"):
        check_batch(run(seq_len=18), mesh)


def test_slices_are_those_of_the_devices() -> None:
    """Chips of one slice stand together, and the slow network is the first axis alone."""

    class Chip(NamedTuple):
        id: int
        slice_index: int
        platform: str = "tpu"
        device_kind: str = "TPU v5 lite"
        process_index: int = 0

    chips = [Chip(i, i % 2) for i in range(8)]
    assert mesh_shape(config.Mesh(fsdp=4), 8, num_slices=2) == (2, 1, 4, 1, 1, 1)
    with pytest.raises(ConfigError, match=r"^sharding.mesh.slices=4: the devices are of 2 slices; leave it at -1"):
        make_mesh(config.Mesh(slices=4), chips)


def test_parameter_that_does_not_divide_is_an_error() -> None:
    with (
        jax.set_mesh(make_mesh(mesh_config((1, 2, 4)))),
        pytest.raises(
            ConfigError,
            match=r"^sharding.mesh: tensor = 4 must divide every 'mlp' axis of the model, and one has size 6; ",
        ),
    ):
        param(nnx.Rngs(params=jax.random.key(0)), (4, 6), ("embed", "mlp"), nnx.initializers.zeros)


def test_parameters_are_born_in_their_layout() -> None:
    mesh = make_mesh(mesh_config((2, 2, 2)))
    with jax.set_mesh(mesh):
        init, _ = build(MODELS["griffin"], config.Kernels())
        params = jax.eval_shape(init, jax.random.key(0))
    want = {
        "embedding": PartitionSpec(("fsdp", "tensor"), None),
        "stack.repeats.0.mixer.in_x.w": PartitionSpec(None, "fsdp", "tensor"),
        "stack.repeats.0.mixer.decay": PartitionSpec(None, "tensor"),
        "stack.repeats.0.ffn.down.w": PartitionSpec(None, "tensor", "fsdp"),
        "stack.repeats.1.mixer.w_q": PartitionSpec(None, "fsdp", "tensor", None),
    }
    specs = {
        ".".join(str(entry.key) for entry in path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert {name: tuple(one(axes) for axes in specs[name]) for name in want} == {
        name: tuple(one(entry) for entry in axes) for name, axes in want.items()
    }


def one(axes: Any) -> Any:
    """A mesh axis alone reads the same as a tuple of it."""
    return axes[0] if isinstance(axes, tuple) and len(axes) == 1 else axes


def test_without_a_mesh_nothing_is_constrained() -> None:
    x = jnp.ones((4, 4))
    assert constrain(x, "batch", None) is x
    assert per_device(len, (("batch",),), ()) is len


def test_per_device_runs_on_each_part() -> None:
    with jax.set_mesh(make_mesh(mesh_config((2, 2, 2)))):
        run = per_device(lambda x: x - jnp.max(x), (("batch", "heads"),), ("batch", "heads"))
        got = jax.jit(run)(jnp.arange(32.0).reshape(4, 8))
    want = np.arange(32.0).reshape(4, 2, 4)
    np.testing.assert_array_equal(got, (want - want.max(-1, keepdims=True)).reshape(4, 8))


def loss_and_gradients(bind: Any, params: Any, tokens: Any, ids: Any, positions: Any) -> Any:
    def objective(params: Any) -> Any:
        lm = bind(params)
        x, _, _ = lm.features(tokens, Segments(ids, positions))
        nll, log_z = token_losses(lm.head(), x, tokens)
        weight = (ids != 0).astype(jnp.float32)
        return jnp.sum((nll + 0.01 * log_z**2) * weight) / jnp.sum(weight)

    return jax.value_and_grad(objective)(params)


@functools.cache
def single_device(name: str) -> tuple[Any, Any, Any, Any]:
    """Parameters, a batch, and the loss and gradients that every mesh must give."""
    init, bind = build(MODELS[name], config.Kernels())
    rng = np.random.default_rng(3)
    like = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda a: 0.3 * rng.standard_normal(a.shape).astype(np.float32), like)
    # A document on both sides of the middle, where two devices may meet.
    ids = np.array([[1] * 7 + [2] * 13 + [0] * 6] * (B // 2) + [[1] * T] * (B // 2), np.int32)
    positions = np.array([[*range(7), *range(13), *range(6)]] * (B // 2) + [[*range(T)]] * (B // 2), np.int32)
    batch = (rng.integers(0, V, (B, T), dtype=np.int32), ids, positions)
    loss, grads = jax.jit(functools.partial(loss_and_gradients, bind))(params, *batch)
    return params, batch, loss, grads


@pytest.mark.parametrize(("name", "axes"), CASES)
def test_every_mesh_gives_the_single_device_loss(name: str, axes: config.Mesh) -> None:
    params, batch, want_loss, want_grads = single_device(name)
    mesh = make_mesh(axes)
    with jax.set_mesh(mesh):
        init, bind = build(MODELS[name], config.Kernels())
        like = jax.eval_shape(init, jax.random.key(0))
        placed = jax.tree.map(lambda a, at: jax.device_put(a, NamedSharding(mesh, at.sharding.spec)), params, like)
        args = placed, *jax.device_put(batch, NamedSharding(mesh, spec("sequences", "time")))
        compiled = jax.jit(functools.partial(loss_and_gradients, bind)).lower(*args).compile()
        loss, grads = compiled(*args)
    assert float(loss) == pytest.approx(float(want_loss), rel=TOLERANCE)
    for (path, a), b, at in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want_grads), jax.tree.leaves(like), strict=True
    ):
        assert a.sharding.is_equivalent_to(NamedSharding(mesh, at.sharding.spec), a.ndim), jax.tree_util.keystr(path)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < TOLERANCE * np.linalg.norm(b) + 1e-7, jax.tree_util.keystr(path)
    if axes.context == 1:
        # Parameters are gathered over fsdp and expert; activations never are.
        gathered = gathered_shapes(str(compiled.as_text()))
        assert bool(gathered) == (axes.fsdp * axes.expert > 1)
        assert not [dims for dims in gathered if any(dim % TIME == 0 for dim in dims)]


def gathered_shapes(hlo: str) -> list[tuple[int, ...]]:
    """Shapes of the floating arrays that a compiled program gathers."""
    lines = [line for line in hlo.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    shapes = [shape for line in lines for shape in re.findall(r"\bb?f\d+\[([\d,]+)\]", line.split(" all-gather")[0])]
    return [tuple(map(int, shape.split(","))) for shape in shapes]
