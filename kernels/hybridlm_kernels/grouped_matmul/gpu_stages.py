"""What the grouped matrix products on Hopper GPUs share: the ring of shared memory between copies and products.

Letters: s stages, r rows of a block, c columns.

A block of threads has three warpgroups. One only fetches: it has the copy engine (TMA) write operands into `STAGES` of
shared memory, as far ahead as there is room. Two multiply (wgmma): each holds half of an output tile in registers,
waits for a stage to be full, and hands it back when its products have read it. Blocks stay on their multiprocessor and
take one tile after the other, so that the next tile's operands arrive while the last one is written.

Operands lie as the tensor cores read them, in units of 8 rows. Pallas tells the copy engine so, and a copy that does
not begin at a multiple of 8 rows then misses parts of the units, silently. Outputs are swizzled but not in units: the
swizzle goes by addresses (CUDA C++ programming guide, "TMA swizzle"), so that their copies begin at any row.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridlm_kernels.gpu_kernel import gpu_kernel
from hybridlm_kernels.grouped_matmul.visits import bounds

BLOCK = 64  # rows of one product, and the 16-bit numbers in the tensor cores' 128-byte rows
ALIGNMENT = 8  # rows of a unit: where copies of operands begin
SWIZZLED = 128  # bytes of a row in shared memory whose parts of 16 are permuted, lest they meet in one bank
CONSUMERS = 2  # warpgroups that multiply
PRODUCER = CONSUMERS  # the number of the warpgroup that fetches
STAGES = 3  # of operands; with 48 KiB each they leave 64 KiB and more to outputs
WIDEST = 256  # columns of a tile: the widest product, and 128 accumulators a thread
MULTIPROCESSORS = 132  # of an H100 or H200
REGISTERS = {"producer": 40, "consumer": 232}  # a thread; of 65536 in all
COMPILER_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)

Ref = Any  # a reference of Pallas, which has no public type for all kinds of them


def operands(*shape: int, dtype: Any) -> Ref:
    """Shared memory [..., r, c] as the tensor cores read it."""
    unit = plgpu.TilingTransform((ALIGNMENT, SWIZZLED // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(unit, plgpu.SwizzleTransform(SWIZZLED)))


def outputs(*shape: int, dtype: Any) -> Ref:
    """Shared memory [..., r, 128 bytes] for results that are to be copied from any row on."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(SWIZZLED),))


def barriers(copies: int) -> list[Ref]:
    """For every stage: it is full after so many copies, and empty once all consumers have read it."""
    return [
        plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
    ]


def tile_width(columns: int, tiles_a_column: int) -> int:
    """Columns of a tile, for the least time of the multiprocessor with most tiles.

    A tile takes time by its columns, and as much as half a block whatever they are. Wide ones read the rows less often;
    narrow ones stand out less beyond the edge, and where there are few they are spread more evenly.
    """
    widths = [width for width in range(WIDEST, 0, -BLOCK) if width <= columns]

    def time(width: int) -> int:
        return pl.cdiv(pl.cdiv(columns, width) * tiles_a_column, MULTIPROCESSORS) * (width + BLOCK // 2)

    return min(widths, key=time)


def spans(group_sizes: Array, m: int) -> tuple[Array, Array, Array]:
    """Of each group the row where its copies begin, and its first row and the first past it counted from there, [g]."""
    first, end = bounds(group_sizes, m)
    begin = first - first % ALIGNMENT
    return begin, first - begin, end - begin


@dataclasses.dataclass(frozen=True)
class Ring:
    """Stages in their order; `step` counts them through all tiles of a block of threads."""

    full: Ref
    empty: Ref

    def fetch(self, step: Array, count: Array, copies: Callable[[Array, Array], list[tuple[Ref, Ref]]]) -> Array:
        """Starts `copies(i, slot)`, (in global memory, in shared memory) pairs, for i < `count`; the next step."""

        def body(i: Array, _: None) -> None:
            slot = lax.rem(step + i, jnp.int32(STAGES))
            pl.when(step + i >= STAGES)(lambda: plgpu.barrier_wait(self.empty.at[slot]))
            for source, target in copies(i, slot):
                plgpu.copy_gmem_to_smem(source, target, self.full.at[slot])

        lax.fori_loop(0, count, body, None)
        return step + count

    def drain(self, step: Array) -> None:
        """Waits until all stages before `step` are read."""
        first = jnp.maximum(step - STAGES, 0)
        lax.fori_loop(first, step, lambda i, _: plgpu.barrier_wait(self.empty.at[lax.rem(i, jnp.int32(STAGES))]), None)

    def multiply(
        self,
        step: Array,
        count: Array,
        tile: tuple[int, int],
        products: Callable[[Ref, Array, Array], None],
    ) -> Array:
        """The float32 sum over i < `count` of what `products(sum, i, slot)` adds to a `tile`; 0 where there is none."""

        def release(i: Array) -> None:
            plgpu.barrier_arrive(self.empty.at[lax.rem(step + i, jnp.int32(STAGES))])

        def run(accumulator: Ref) -> Array:
            def body(i: Array, _: None) -> None:
                slot = lax.rem(step + i, jnp.int32(STAGES))
                plgpu.barrier_wait(self.full.at[slot])
                products(accumulator, i, slot)
                plgpu.wgmma_wait(1)  # the product before is done
                pl.when(i > 0)(lambda: release(i - 1))

            lax.fori_loop(0, count, body, None)
            return accumulator[...]

        total = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(tile, jnp.float32))
        pl.when(count > 0)(lambda: release(count - 1))
        return total


def each_item(count: Array, body: Callable[[Array, Array], Array]) -> Array:
    """`body(item, step)`, which returns the next step, for this block's share of `count` items; the last step."""
    first, stride = lax.axis_index("block"), lax.axis_size("block")
    share = lax.div(count - first + stride - 1, jnp.int32(stride))
    return lax.fori_loop(0, share, lambda i, step: body(first + i * stride, step), jnp.int32(0))


def work(ring: Ring, produce: Callable[[], Array], consume: Callable[[Array], Array]) -> None:
    """Divides the warpgroups: one runs `produce`, the others `consume(number)`; both return the last step."""
    number = lax.axis_index("warpgroup")

    @pl.when(number == PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS["producer"], action="decrease")
        ring.drain(produce())

    @pl.when(number < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS["consumer"], action="increase")
        consume(number)
        plgpu.wait_smem_to_gmem(0)


def launch(
    name: str,
    body: Callable[..., None],
    out: jax.ShapeDtypeStruct,
    scratch: list[Ref],
    most_items: int,
    operands: Sequence[Array],
) -> Array:
    """The result of the kernel `body(*operands, out, *scratch)` on as many blocks of threads as there is work for."""
    run = gpu_kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(min(MULTIPROCESSORS, most_items),),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
        kernel_name=name,
    )
    return run(*operands)
