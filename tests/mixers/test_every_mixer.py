"""What holds for every registered mixer, at every example it was registered with.

Letters: b batch, t time, d model width.
"""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.mixers import MIXERS
from hybridlm.mixers.base import Context, Segments
from hybridlm.sharding import make_mesh, spec

B, T, D = 8, 37, 32
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2, float32 against float32 in another order of operations
# Token by token: a tenth of the time to compile. Mixers on chunks are in the tests of their own, against oracles.
KERNELS = config.Kernels(gated_linear_attention="reference", gated_delta_rule="reference")
CONTEXT = Context(width=D, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=KERNELS)

# (row, first token, length) of the documents that `packed_ids` places; what is left is padding.
DOCUMENTS = [(0, 0, 11), (0, 11, 13), (0, 24, 13), (1, 0, 13), (2, 2, 11), (2, 14, 13), (3, 0, 1), (3, 1, 1)]


class Subject(NamedTuple):
    cfg: config.Mixer
    params: Any
    apply: Callable[..., Any]
    """(params, x, segments, state) -> (y, state), jitted."""
    gradients: Callable[..., Any]
    """(params, x, segments, cotangent) -> gradients of sum(y * cotangent) in params and x, jitted."""
    init_state: Callable[[int, int], Any]


@functools.cache
def subject_of(cfg: config.Mixer) -> Subject:
    module = MIXERS.module_of(cfg)

    def make(key: Any) -> Any:
        return module(cfg, CONTEXT, nnx.Rngs(params=key))

    graphdef = nnx.graphdef(jax.eval_shape(make, jax.random.key(0)))

    def init(key: Any) -> Any:
        params = nnx.to_pure_dict(nnx.state(make(key)))
        # Biases and norms start at constants, where a mistake in them would not show.
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, noisy)

    def apply(params: Any, x: Any, segments: Segments, state: Any) -> Any:
        y, state, _ = nnx.merge(graphdef, params)(x, segments, state, {})
        return y, state

    def objective(params: Any, x: Any, segments: Segments, cotangent: Any) -> Any:
        return jnp.sum(apply(params, x, segments, None)[0] * cotangent)

    params = jax.jit(init)(jax.random.key(7, impl="unsafe_rbg"))  # compiles in a third of the time
    return Subject(
        cfg,
        params,
        jax.jit(apply),
        jax.jit(jax.grad(objective, argnums=(0, 1))),
        lambda batch, length: nnx.merge(graphdef, params).init_state(batch, length),
    )


def examples() -> Iterator[tuple[config.Mixer, str, bool]]:
    """With its name, and whether it is the first of its mixer."""
    for entry in MIXERS.entries.values():
        for i, cfg in enumerate(entry.examples):
            yield cfg, f"{type(cfg).__name__}{i}", i == 0


def case(*values: Any, example: str, case: str, is_slow: bool) -> Any:
    """One process runs all of an example's tests, which share what they compile."""
    marks = [pytest.mark.xdist_group(example), *([pytest.mark.slow] if is_slow else [])]
    return pytest.param(*values, id=case, marks=marks)


@pytest.fixture(params=[case(cfg, example=name, case=name, is_slow=not first) for cfg, name, first in examples()])
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(request.param)


def test_each_registered_mixer_has_an_example() -> None:
    assert all(entry.examples for entry in MIXERS.entries.values())


def test_output_has_the_shape_and_dtype_of_the_input(subject: Subject, rng: np.random.Generator) -> None:
    x = inputs(rng)
    y, state = subject.apply(subject.params, x, one_document(B, T), None)
    assert (y.shape, y.dtype, state) == (x.shape, x.dtype, None)
    half = jax.eval_shape(subject.apply, subject.params, jnp.asarray(x, jnp.bfloat16), one_document(B, T), None)[0]
    assert (half.shape, half.dtype) == (x.shape, jnp.bfloat16)


def test_state_keeps_its_shapes_and_dtypes(subject: Subject, rng: np.random.Generator) -> None:
    before = subject.init_state(B, T)
    _, after = subject.apply(subject.params, inputs(rng), one_document(B, T), before)
    assert jax.tree.map(abstract, before) == jax.tree.map(abstract, after)
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(after))


def test_outputs_depend_on_no_later_token(subject: Subject, rng: np.random.Generator) -> None:
    x = inputs(rng)
    changed = np.concatenate([x[:, :20], inputs(rng)[:, 20:]], axis=1)
    y, _ = subject.apply(subject.params, x, one_document(B, T), None)
    y_changed, _ = subject.apply(subject.params, changed, one_document(B, T), None)
    np.testing.assert_array_equal(y[:, :20], y_changed[:, :20])
    assert distance(y_changed[:, 20:], y[:, 20:]) > 0.1


def test_packed_documents_equal_each_alone(subject: Subject, rng: np.random.Generator) -> None:
    segments = segments_of(packed_ids())
    real = (segments.ids != 0)[:, :, None]
    x, cotangent = inputs(rng), inputs(rng) * real
    packed, _ = subject.apply(subject.params, x, segments, None)
    packed_params, packed_x = subject.gradients(subject.params, x, segments, cotangent)

    # Each document at the beginning of a row of its own. What follows it is padding, which causality makes harmless.
    ids = np.array([[1] * length + [0] * (T - length) for _, _, length in DOCUMENTS], np.int32)

    def alone(array: Any) -> np.ndarray:
        rows = np.zeros((len(DOCUMENTS), *array.shape[1:]), np.float32)
        for i, (row, first, length) in enumerate(DOCUMENTS):
            rows[i, :length] = array[row, first : first + length]
        return rows

    y, _ = subject.apply(subject.params, alone(x), segments_of(ids), None)
    dparams, dx = subject.gradients(subject.params, alone(x), segments_of(ids), alone(cotangent))
    assert distance(alone(np.asarray(packed)), y * (ids != 0)[:, :, None]) < TOLERANCE
    assert distance(alone(np.asarray(packed_x)), dx) < GRADIENT_TOLERANCE
    np.testing.assert_array_equal(np.where(real, 0.0, packed_x), 0.0)
    assert_trees_close(packed_params, dparams)


def test_padding_influences_nothing(subject: Subject, rng: np.random.Generator) -> None:
    x, segments = inputs(rng), segments_of(packed_ids())
    real = (segments.ids != 0)[:, :, None]
    other = np.where(real, x, 100.0 * inputs(rng))
    y, state = subject.apply(subject.params, x, segments, subject.init_state(B, T))
    y_other, state_other = subject.apply(subject.params, other, segments, subject.init_state(B, T))
    np.testing.assert_array_equal(np.where(real, y, 0), np.where(real, y_other, 0))
    jax.tree.map(np.testing.assert_array_equal, state, state_other)


def test_padding_leaves_the_state_unchanged(subject: Subject, rng: np.random.Generator) -> None:
    _, state = subject.apply(subject.params, inputs(rng), segments_of(packed_ids()), subject.init_state(B, 2 * T))
    padding = segments_of(np.zeros((B, T), np.int32))
    _, after = subject.apply(subject.params, inputs(rng), padding, state)
    jax.tree.map(np.testing.assert_array_equal, state, after)


def test_decode_token_by_token_equals_the_parallel_forward(subject: Subject, rng: np.random.Generator) -> None:
    x, segments = inputs(rng), segments_of(packed_ids())
    want, _ = subject.apply(subject.params, x, segments, None)
    state, outputs = subject.init_state(B, T), []
    for t in range(T):
        token = Segments(segments.ids[:, t : t + 1], segments.positions[:, t : t + 1])
        y, state = subject.apply(subject.params, x[:, t : t + 1], token, state)
        outputs.append(y)
    real = (segments.ids != 0)[:, :, None]
    assert distance(np.concatenate(outputs, axis=1) * real, want * real) < TOLERANCE


def test_prefill_in_ragged_chunks_equals_the_whole(subject: Subject, rng: np.random.Generator) -> None:
    x = inputs(rng)
    ids = np.ones((B, T), np.int32)
    ids[1, 13:], ids[2, 20:], ids[2, 21:], ids[5, 16:], ids[6, 18:] = 2, 2, 3, 2, 2
    segments = segments_of(ids)
    want, _ = subject.apply(subject.params, x, segments, None)
    got, size = np.zeros(x.shape, np.float32), 16
    # Real tokens per row and chunk; every row sums to T.
    lengths = np.array([[5, 16, 0, 16], [16, 3, 2, 16], [9, 9, 9, 10], [1, 16, 16, 4]] * 2)
    taken, state = np.zeros(B, int), subject.init_state(B, T)
    for chunk in range(lengths.shape[1]):
        index = taken[:, None] + np.arange(size)
        real = np.arange(size) < lengths[:, chunk, None]
        rows, index = np.arange(B)[:, None], np.minimum(index, T - 1)
        part = Segments(*(np.where(real, array[rows, index], 0) for array in segments))
        y, state = subject.apply(subject.params, x[rows, index], part, state)
        got[np.broadcast_to(rows, real.shape)[real], index[real]] = np.asarray(y)[real]
        taken += lengths[:, chunk]
    assert distance(got, want) < TOLERANCE


def test_position_zero_starts_afresh_whatever_the_state(subject: Subject, rng: np.random.Generator) -> None:
    x, segments = inputs(rng), one_document(B, T)
    _, used = subject.apply(subject.params, inputs(rng), segments, subject.init_state(B, 2 * T))
    got, state = subject.apply(subject.params, x, segments, used)
    want, _ = subject.apply(subject.params, x, segments, subject.init_state(B, 2 * T))
    assert distance(got, want) < TOLERANCE
    # And the state that it leaves is the new document's: what follows sees nothing older.
    follows = Segments(segments.ids, segments.positions + T)
    y, _ = subject.apply(subject.params, x, follows, state)
    whole, _ = subject.apply(subject.params, np.concatenate([x, x], axis=1), one_document(B, 2 * T), None)
    assert distance(y, whole[:, T:]) < TOLERANCE


def test_position_zero_separates_documents_of_one_id(subject: Subject, rng: np.random.Generator) -> None:
    """The same id twice with padding between: two documents, as their positions say."""
    x, ids = inputs(rng), np.ones((B, T), np.int32)
    ids[:, 15:17] = 0
    segments = segments_of(ids)
    renamed = Segments(np.where(np.arange(T) > 16, 2 * segments.ids, segments.ids), segments.positions)
    real = (segments.ids != 0)[:, :, None]
    for state in (None, subject.init_state(B, T)):
        got, _ = subject.apply(subject.params, x, segments, state)
        want, _ = subject.apply(subject.params, x, renamed, state)
        assert distance(got * real, want * real) < TOLERANCE


@pytest.mark.parametrize("kind", ["zeros", "huge", "identical", "alternating"])
def test_extreme_inputs_give_finite_gradients(subject: Subject, rng: np.random.Generator, kind: str) -> None:
    sign = (-1.0) ** np.arange(T)[None, :, None]
    x = {
        "zeros": np.zeros((B, T, D)),
        "huge": 1e4 * inputs(rng),
        "identical": np.broadcast_to(inputs(rng)[:, :1], (B, T, D)),
        "alternating": 1e3 * sign * np.ones((B, T, D)),
    }[kind].astype(np.float32)
    segments = segments_of(packed_ids())
    grads = subject.gradients(subject.params, x, segments, inputs(rng))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def mesh_id(mesh: config.Mesh) -> str:
    axes = vars(mesh).items()
    return " ".join(f"{axis}={size}" for axis, size in axes if size > 1)


MESHES = (config.Mesh(data=2, fsdp=2, tensor=2), config.Mesh(data=1, fsdp=2, context=4))
MORE_MESHES = (
    config.Mesh(data=8),
    config.Mesh(data=1, fsdp=8),
    config.Mesh(data=1, fsdp=2, tensor=4),
    config.Mesh(data=1, context=8),
    config.Mesh(slices=2, data=1, context=2, tensor=2),
)


def sharded() -> Iterator[Any]:
    """The first example of a mixer on every mesh, the others on two."""
    for cfg, name, first in examples():
        for mesh in MESHES + (MORE_MESHES if first else ()):
            is_slow = not first or mesh in MORE_MESHES
            yield case(cfg, mesh, example=name, case=f"{name}-{mesh_id(mesh)}", is_slow=is_slow)


def assert_does_not_divide(error: ConfigError) -> None:
    """`tensor` is refused, and rightly: an axis of a parameter is not a multiple of its devices."""
    found = re.search(
        r"sharding.mesh: (.*) = (\d+) must divide every '.*' axis of the model, and one has size (\d+)", str(error)
    )
    assert found and "tensor" in found[1], error
    assert int(found[3]) % int(found[2]) != 0, error


@pytest.mark.parametrize(("subject", "mesh"), list(sharded()), indirect=["subject"])
def test_sharded_equals_unsharded(subject: Subject, rng: np.random.Generator, mesh: config.Mesh) -> None:
    module = MIXERS.module_of(subject.cfg)
    # The tiers that go token by token have a whole sequence before them.
    context = replace(CONTEXT, kernels=config.Kernels()) if mesh.context > 1 else CONTEXT
    segments = segments_of(packed_ids())
    x, cotangent = steady_inputs(subject, segments, rng)
    real = (segments.ids != 0)[:, :, None]
    # Padding at the end, so that devices can share the time.
    longer = ((0, 0), (0, -T % 8 if mesh.context > 1 else 0), (0, 0))
    batch = np.pad(x, longer), Segments(*(np.pad(a, longer[:2]) for a in segments)), np.pad(cotangent, longer)
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        try:
            made = jax.eval_shape(lambda key: module(subject.cfg, context, nnx.Rngs(params=key)), jax.random.key(0))
        except ConfigError as error:
            assert_does_not_divide(error)
            pytest.skip(f"the example does not divide by tensor={mesh.tensor}")
        graphdef, state = nnx.split(made)

        def objective(params: Any, x: Any, segments: Segments, cotangent: Any) -> Any:
            y, _, _ = nnx.merge(graphdef, params)(x, segments, None, {})
            return jnp.sum(y * cotangent), y

        def put(x: Any, at: PartitionSpec) -> jax.Array:
            return jax.device_put(x, NamedSharding(devices, at))

        placed = jax.tree.map(lambda x, like: put(x, like.sharding.spec), subject.params, nnx.to_pure_dict(state))
        batch = jax.tree.map(lambda x: put(x, spec("sequences", "time")), batch)
        run = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
        (dparams, dx), y = run(placed, *batch)
    want, _ = subject.apply(subject.params, x, segments, None)
    want_params, want_x = subject.gradients(subject.params, x, segments, cotangent)
    assert distance(np.asarray(y)[:, :T] * real, want * real) < TOLERANCE
    assert distance(np.asarray(dx)[:, :T], want_x) < GRADIENT_TOLERANCE
    assert_trees_close(dparams, want_params)


def test_flops_are_those_that_xla_counts(subject: Subject) -> None:
    """One token at a width where matmuls dominate; how attention grows with the length is in test_attention."""
    context = Context(**{**vars(CONTEXT), "width": 512})
    module = MIXERS.module_of(subject.cfg)
    abstract_module = jax.eval_shape(lambda: module(subject.cfg, context, nnx.Rngs(params=jax.random.key(0))))
    graphdef, params = nnx.split(abstract_module)

    def forward(params: Any, x: Any, segments: Segments) -> Any:
        return nnx.merge(graphdef, params)(x, segments, None, {})[0]

    x, ids = jax.ShapeDtypeStruct((8, 1, 512), jnp.float32), jax.ShapeDtypeStruct((8, 1), jnp.int32)
    cost = jax.jit(forward).lower(params, x, Segments(ids, ids)).compile().cost_analysis()
    assert module.flops(subject.cfg, context, 1) == pytest.approx(cost["flops"] / 8, rel=0.15)


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((B, T, D)).astype(np.float32)


def steady_inputs(subject: Subject, segments: Segments, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """x and a cotangent, 0 at padding, for which the rounding of x itself hardly moves gradients.

    A head whose output is nearly 0 is divided by its norm: there float32 has no gradient to compare with.
    """
    while True:
        x, cotangent = inputs(rng), inputs(rng) * (segments.ids != 0)[:, :, None]
        rounded = x * (1 + 2**-23 * rng.choice([-1.0, 1.0], x.shape)).astype(np.float32)
        (_, dx), (_, other) = (subject.gradients(subject.params, a, segments, cotangent) for a in (x, rounded))
        if distance(other, dx) < GRADIENT_TOLERANCE / 4:
            return x, cotangent


def packed_ids() -> np.ndarray:
    """Rows 4 to 7 are padding alone."""
    ids = np.zeros((B, T), np.int32)
    for i, (row, first, length) in enumerate(DOCUMENTS):
        ids[row, first : first + length] = i + 1
    return ids


def segments_of(ids: np.ndarray) -> Segments:
    positions = np.zeros_like(ids)
    for t in range(1, ids.shape[1]):
        positions[:, t] = np.where(ids[:, t] == ids[:, t - 1], positions[:, t - 1] + 1, 0)
    return Segments(ids, positions)


def one_document(batch: int, length: int) -> Segments:
    return segments_of(np.ones((batch, length), np.int32))


def abstract(x: jax.Array) -> tuple[tuple[int, ...], Any]:
    return x.shape, x.dtype


def distance(got: Any, want: Any) -> float:
    """Relative L2."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def assert_trees_close(got: Any, want: Any) -> None:
    """Leaves within the tolerance of the largest gradient's scale: exact zeros have no relative error."""
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(want))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(np.asarray(a) - np.asarray(b)) / max(np.linalg.norm(np.asarray(b)), 1e-3 * largest)
        assert error < GRADIENT_TOLERANCE, jax.tree_util.keystr(path)
