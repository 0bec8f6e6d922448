"""Recurrences over time on Hopper GPUs (Pallas' Mosaic GPU backend): what the kernels of several operations share.

Letters: b batch, t time, d channels, n chunks of time. A block is `block_time` tokens of `block_channels` channels.

One warpgroup of 128 threads owns one batch row, one block of channels and one chunk of time. It walks through its
blocks of time: the copy engine (TMA) moves blocks between global and shared memory, `STAGES` of them in flight, while
the warpgroup advances one token at a time with its carries in registers. The copy engine clips blocks at the edges of
the arrays, so any t and d are served in place.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridlm_kernels.gpu_kernel import gpu_kernel

Rows = tuple[Array, ...]  # one token of several arrays, each [block_channels]
# (carries, what the token carries of its own such as its kind, one row per stream) -> (carries, output rows)
Token = Callable[[Rows, Array | None, Rows], tuple[Rows, Rows]]

WARPGROUP = 128
STAGES = 3  # blocks in flight; with 96 KiB a block, two warpgroups fit on a multiprocessor of 227 KiB
SHARED_BYTES = 96 * 1024
MIN_CHUNK_BLOCKS = 4 * STAGES  # of time, so that filling the pipeline is little of the whole
GROUP = 8  # tokens whose loads and elementwise work are independent, hence overlap
TARGET_WARPGROUPS = 2 * 132  # two on every multiprocessor of an H100 or H200
COPY_ALIGNMENT = 16  # bytes; the copy engine's strides are multiples of it
SLOT_ALIGNMENT = 32  # int32 numbers in 128 bytes, the copy engine's alignment in shared memory


@dataclasses.dataclass(frozen=True)
class Plan:
    """How b x t x d is divided: `num_chunks` of `chunk_blocks` blocks of time each, the last one shorter."""

    b: int
    t: int
    d: int
    block_channels: int
    block_time: int
    num_chunks: int
    chunk_blocks: int

    @property
    def num_blocks(self) -> int:
        return pl.cdiv(self.t, self.block_time)

    @property
    def padded_d(self) -> int:
        return pl.cdiv(self.d, self.block_channels) * self.block_channels

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.b, self.num_chunks, self.padded_d // self.block_channels


def plan(shape: Sequence[int], row_bytes: int, *, splits_cost: bool = True) -> Plan:
    """The division of [b, t, d] = `shape`, where one token of one channel takes `row_bytes` in shared memory.

    Time is split only where b and d leave most multiprocessors idle, since a recurrence then reads its operands twice;
    `splits_cost=False` is for operations that need no first pass.
    """
    b, t, d = shape
    fits = 2 * GROUP * 2 * WARPGROUP * row_bytes * STAGES <= SHARED_BYTES
    wide = fits and b * pl.cdiv(d, 2 * WARPGROUP) >= TARGET_WARPGROUPS
    block_channels = 2 * WARPGROUP if wide else WARPGROUP
    block_time = 64
    while block_time > GROUP and (
        block_time >= 2 * t or block_time * block_channels * row_bytes * STAGES > SHARED_BYTES
    ):
        block_time //= 2
    num_blocks = pl.cdiv(t, block_time)
    warpgroups = b * pl.cdiv(d, block_channels)
    wanted = (
        pl.cdiv(TARGET_WARPGROUPS, warpgroups) if warpgroups < TARGET_WARPGROUPS // (4 if splits_cost else 1) else 1
    )
    chunk_blocks = max(pl.cdiv(num_blocks, wanted), min(num_blocks, MIN_CHUNK_BLOCKS))
    return Plan(b, t, d, block_channels, block_time, pl.cdiv(num_blocks, chunk_blocks), chunk_blocks)


def unsupported(arrays: Sequence[Array | jax.ShapeDtypeStruct], compute_capability: float | None) -> str | None:
    """Why these [b, t, d] arrays cannot be streamed, or None."""
    if compute_capability is None or compute_capability < 9.0:
        return "needs a Hopper GPU (compute capability 9.0)"
    for array in arrays:
        if array.dtype.name not in ("bfloat16", "float32"):
            return f"serves bfloat16 and float32 operands, not {array.dtype.name}"
        if array.shape[-1] * array.dtype.itemsize % COPY_ALIGNMENT:
            return (
                f"needs rows of a multiple of {COPY_ALIGNMENT} bytes, not {array.shape[-1]} {array.dtype.name} channels"
            )
    return None


def pad_channels(array: Array, plan: Plan) -> Array:
    """float32 and filled up to whole blocks of channels: small operands are read without the copy engine."""
    missing = plan.padded_d - array.shape[-1]
    return jnp.pad(array.astype(jnp.float32), [(0, 0)] * (array.ndim - 1) + [(0, missing)])


def block_rows(per_token: Array, plan: Plan) -> Array:
    """[b, t] as [b, blocks, s] int32, each block of time on its own aligned row."""
    t_missing = plan.num_blocks * plan.block_time - plan.t
    filled = jnp.pad(per_token.astype(jnp.int32), ((0, 0), (0, t_missing)))
    rows = filled.reshape(plan.b, plan.num_blocks, plan.block_time)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, -plan.block_time % SLOT_ALIGNMENT)))


@dataclasses.dataclass(frozen=True)
class Stream:
    """A [b, t, d] input that hands token t its row t + `shift`, or one of `outside` [b, s, d] beyond its ends.

    The s = |shift| rows of `outside` are in the order of time.
    """

    array: Array
    shift: int = 0
    outside: Array | None = None


def stream_blocks(
    num_blocks: Array,
    inputs: Sequence[tuple[jax.Ref, Callable[[Array], tuple], tuple[int, ...]]],
    outputs: Sequence[tuple[jax.Ref, Callable[[Array], tuple], tuple[int, ...]]],
    body: Callable[[Array, Sequence[jax.Ref], Sequence[jax.Ref], Rows], Rows],
    carries: Rows,
) -> Rows:
    """`body(i, input blocks, output blocks, carries)` for i = 0, 1, ..., `STAGES` blocks in flight; the last carries.

    An input or output is its array, the window of block i and the window's shape.
    """

    def run(ins: Sequence[jax.Ref], outs: Sequence[jax.Ref], ready: jax.Ref) -> Rows:
        def fetch(i: Array, slot: Array) -> None:
            for (array, window, _), buffer in zip(inputs, ins, strict=True):
                plgpu.copy_gmem_to_smem(array.at[window(i)], buffer.at[slot], ready.at[slot])

        def step(i: Array, carries: Rows) -> Rows:
            slot = lax.rem(i, jnp.int32(STAGES))
            plgpu.barrier_wait(ready.at[slot])
            if outputs:
                plgpu.wait_smem_to_gmem(STAGES - 1, wait_read_only=True)
            carries = body(i, [ref.at[slot] for ref in ins], [ref.at[slot] for ref in outs], carries)
            plgpu.commit_smem()  # from here on no thread reads this slot, and the copy engine sees what was written
            for (array, window, _), buffer in zip(outputs, outs, strict=True):
                plgpu.copy_smem_to_gmem(buffer.at[slot], array.at[window(i)], commit_group=False)
            if outputs:
                plgpu.commit_smem_to_gmem_group()
            pl.when(i + STAGES < num_blocks)(lambda: fetch(i + STAGES, slot))
            return carries

        for i in range(STAGES):
            pl.when(i < num_blocks)(functools.partial(fetch, jnp.int32(i), jnp.int32(i)))
        carries_after = lax.fori_loop(0, num_blocks, step, carries)
        if outputs:
            plgpu.wait_smem_to_gmem(0)
        return carries_after

    return pl.run_scoped(
        run,
        [plgpu.SMEM((STAGES, *shape), array.dtype) for array, _, shape in inputs],
        [plgpu.SMEM((STAGES, *shape), array.dtype) for array, _, shape in outputs],
        plgpu.Barrier(num_arrivals=len(inputs), num_barriers=STAGES),
    )


def for_rows(
    low: Array | int,
    high: Array | int,
    tokens: Callable[[Sequence[Array], Rows], Rows],
    carries: Rows,
    *,
    reverse: bool,
    group: int = GROUP,
) -> Rows:
    """`tokens(rows, carries)` over rows low..high - 1 or back, `group` rows at a time and the remainder one by one."""
    low, high = jnp.int32(low), jnp.int32(high)
    groups = (high - low) // group
    middle = low + groups * group

    def several(i: Array, carries: Rows) -> Rows:
        first = low + (groups - 1 - i if reverse else i) * group
        rows = [first + j for j in range(group)]
        return tokens(rows[::-1] if reverse else rows, carries)

    def single(i: Array, carries: Rows) -> Rows:
        return tokens([high - 1 - i if reverse else middle + i], carries)

    loops = [(groups, several)] if group == 1 else [(groups, several), (high - middle, single)]
    for count, step in loops[::-1] if reverse else loops:
        carries = lax.fori_loop(0, count, step, carries)
    return carries


def scan(
    name: str,
    token: Callable[[Rows], Token],
    streams: Sequence[Stream],
    per_token: Array | None,
    starts: Sequence[Array],
    constants: Sequence[Array],
    outputs: Sequence[jax.typing.DTypeLike],
    plan: Plan,
    *,
    reverse: bool,
    summary: tuple[Array, Array] | None = None,
) -> tuple[list[Array], list[Array]]:
    """The tokens' outputs, each [b, t, d], and each chunk's carries after its last token, [b, n, d] in scan order.

    `token(constants)` is called once per warpgroup with rows of `constants`, each [b, d] or [d], and returns the step,
    which gets the number that `per_token` [b, t] holds for a token. `starts` are the carries before the first token,
    [d], [b, d] or, in scan order, [b, n, d]. With `summary`, the total decay of each chunk and what it adds to a zero
    state, each [b, n, d], the first carry enters chunk c as the chunks before it leave it; others start anew in each.
    """
    extras = [pad_channels(array, plan) for array in (*starts, *constants)]
    summary_arrays = [] if summary is None else [pad_channels(array, plan) for array in summary]
    numbers = [] if per_token is None else [block_rows(per_token, plan)]
    block = (plan.block_time, plan.block_channels)
    before, after = (max(sign * stream.shift for stream in streams) for sign in (-1, 1))
    outside = [pad_channels(s.outside, plan) for s in streams if s.outside is not None]

    def kernel(*refs_and_scratch: jax.Ref) -> None:
        *refs, scratch = refs_and_scratch
        load_row = functools.partial(through_shared_memory, scratch)
        counts = [len(part) for part in (streams, numbers, outside, extras, summary_arrays, outputs, starts)]
        rest = iter(refs)
        stream_refs, number_refs, outside_refs, extra_refs, summary_refs, out_refs, last_refs = (
            list(itertools.islice(rest, count)) for count in counts
        )
        row, chunk = lax.axis_index("b"), lax.axis_index("n")
        channels = pl.ds(lax.axis_index("d") * plan.block_channels, plan.block_channels)
        extra = [load_row(ref, (row, chunk)[: len(ref.shape) - 1] + (channels,)) for ref in extra_refs]
        carries = extra[: len(starts)]
        if summary_refs:
            load_chunk = [lambda c, ref=ref: load_row(ref, (row, c, channels)) for ref in summary_refs]
            carries[0] = entering(load_chunk[0], load_chunk[1], chunk, carries[0])
        advance = token(tuple(extra[len(starts) :]))
        first_block = chunk * plan.chunk_blocks

        def block_of(i: Array) -> Array:
            return plan.num_blocks - 1 - first_block - i if reverse else first_block + i

        def window(shift: int) -> Callable[[Array], tuple]:
            """Of a stream: the first block's starts no earlier than token 0, and the last one's is clipped."""
            return lambda i: (
                row,
                pl.ds(jnp.maximum(block_of(i) * plan.block_time + shift, 0), plan.block_time),
                channels,
            )

        def body(i: Array, ins: Sequence[jax.Ref], outs: Sequence[jax.Ref], carries: Rows) -> Rows:
            start = block_of(i) * plan.block_time

            def tokens(rows: Sequence[Array], carries: Rows, *, is_outside: bool) -> Rows:
                def load(r: Array) -> Rows:
                    beyond, values = iter(outside_refs), []
                    for ref, stream in zip(ins, streams, strict=False):
                        edge = None if stream.outside is None else next(beyond)
                        if is_outside and edge is not None:
                            position = start + r + (0 if stream.shift < 0 else stream.shift - plan.t)
                            values.append(load_row(edge, (row, position, channels)))
                        else:
                            values.append(ref[r + jnp.minimum(start + stream.shift, 0) if stream.shift < 0 else r])
                    return tuple(values)

                loaded = [load(r) for r in rows]
                own = [ins[-1][r] if numbers else None for r in rows]
                results = []
                for number, values in zip(own, loaded, strict=True):
                    carries, result = advance(carries, number, values)
                    results.append(result)
                for r, result in zip(rows, results, strict=True):
                    for ref, value in zip(outs, result, strict=True):
                        ref[r] = value.astype(ref.dtype)
                return carries

            inside = functools.partial(tokens, is_outside=False)
            at_edge = functools.partial(tokens, is_outside=True)
            high = jnp.minimum(plan.block_time, plan.t - start)
            low_end, high_end = jnp.clip(before - start, 0, high), jnp.clip(plan.t - after - start, 0, high)
            low_end = jnp.minimum(low_end, high_end) if after else low_end
            parts = [(0, low_end, at_edge)] if before else []
            parts += [(low_end if before else 0, high_end if after else high, inside)]
            parts += [(high_end, high, at_edge)] if after else []
            for first, last, advance_rows in parts[::-1] if reverse else parts:
                size = GROUP if advance_rows is inside else 1
                carries = for_rows(first, last, advance_rows, carries, reverse=reverse, group=size)
            return carries

        inputs = [(ref, window(s.shift), block) for ref, s in zip(stream_refs, streams, strict=True)]
        inputs += [(ref, lambda i: (row, block_of(i)), ref.shape[2:]) for ref in number_refs]
        num_blocks = jnp.minimum(plan.chunk_blocks, plan.num_blocks - first_block)
        last = stream_blocks(num_blocks, inputs, [(ref, window(0), block) for ref in out_refs], body, tuple(carries))
        for ref, value in zip(last_refs, last, strict=True):
            ref[row, chunk, channels] = value

    arrays = [stream.array for stream in streams]
    large = [jax.ShapeDtypeStruct((plan.b, plan.t, plan.d), dtype) for dtype in outputs]
    small = jax.ShapeDtypeStruct((plan.b, plan.num_chunks, plan.padded_d), jnp.float32)
    results = gpu_kernel(
        kernel,
        out_type=[*large, *[small] * len(starts)],
        scratch_types=[plgpu.SMEM(block[1:], jnp.float32)],
        grid=plan.grid,
        grid_names=("b", "n", "d"),  # neighbouring channels run together, which is how they lie in memory
        compiler_params=COMPILER_PARAMS,
        kernel_name=name,
    )(*arrays, *numbers, *outside, *extras, *summary_arrays)
    return list(results[: len(outputs)]), [last[:, :, : plan.d] for last in results[len(outputs) :]]


# Barriers around every store would cost more than the work of a token. They are not needed: shared memory is either
# written by the copy engine and read by the threads, or the other way round, and `stream_blocks` keeps the two apart.
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)


def identity_and_zero(plan: Plan) -> list[Array]:
    """The carries of a chunk's summary before its first token: no decay yet, nothing added yet."""
    return [jnp.ones(plan.d, jnp.float32), jnp.zeros(plan.d, jnp.float32)]


def through_shared_memory(scratch: jax.Ref, array: jax.Ref, index: tuple) -> Array:
    """A row of a small operand, by way of `scratch`; every thread reads back what it wrote.

    Under `jax.shard_map` what is read of operands varies over the mesh, what is read of shared memory does not, and a
    loop's carries may not change in this.
    """
    scratch[...] = array[index]
    return scratch[...]


def entering(
    decay_of: Callable[[Array], Array], added_of: Callable[[Array], Array], chunk: Array, state: Array
) -> Array:
    """The state that enters a chunk, from the decays and additions of the chunks before it."""

    def earlier(chunks: Sequence[Array], carries: Rows) -> Rows:
        (state,) = carries
        for decay, added in [(decay_of(c), added_of(c)) for c in chunks]:
            state = decay * state + added
        return (state,)

    return for_rows(0, chunk, earlier, (state,), reverse=False)[0]


def reciprocal(x: Array) -> Array:
    """1 / x for x > 0: a reciprocal root, squared and refined, is half the instructions of a division."""
    root = lax.rsqrt(x)
    estimate = root * root
    return estimate * (2.0 - x * estimate)


def fold(decay: Array, added: Array) -> tuple[Array, Array]:
    """The chunks' decays and additions [b, n, d] as those of all of time, [b, d]."""
    total, state = decay[:, 0], added[:, 0]
    for i in range(1, decay.shape[1]):
        total, state = decay[:, i] * total, decay[:, i] * state + added[:, i]
    return total, state
