"""Into what blocks the TPU's kernels cut their operands: the best by a model of their cycles and their memory traffic.

Letters: m rows, k inputs, n outputs, g groups.
"""

import dataclasses

LANES = 128
ROWS = (128, 256, 512)
MIB = 2**20
CYCLES_PER_STEP = 400  # of the grid, beside the multiplication; after the compiler's schedules
FLOAT32_PASSES = 6  # of bfloat16 products in one of float32


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a JAX device can do at most in a cycle of each of its cores."""

    products: int
    hbm_bytes: int
    cores: int = 1
    """Each takes half of a grid's parallel steps where there are two."""
    vmem: int = 12 * MIB
    """For blocks and sums, of the 16 MiB that a kernel has unless it asks for more; the compiler keeps some itself."""


CHIPS = {
    "TPU v4": Chip(4 * 128 * 128, 585, 2),
    "TPU v5 lite": Chip(4 * 128 * 128, 547),
    "TPU v5": Chip(4 * 128 * 128, 703, 2),
    "TPU v6 lite": Chip(4 * 256 * 256, 937, vmem=24 * MIB),
    "TPU7x": Chip(4 * 256 * 256, 1682, vmem=24 * MIB),
}
"""By the device's own name, from bench/chips.py."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The sides of a block."""

    rows: int
    inputs: int
    outputs: int


def of_products(m: int, k: int, n: int, g: int, itemsize: int, kind: str) -> Blocks:
    """For rows times matrices; `inputs` divides k. A matrix that is cut along k is read again at every visit."""

    chip = _chip(kind)

    def vmem(block: Blocks) -> int:
        b, bk, bn = dataclasses.astuple(block)
        sums = 2 if bk < k else 1
        return 2 * itemsize * (b * bk + bk * bn + b * bn) + 4 * sums * b * bn

    def cost(block: Blocks) -> tuple[float, float]:
        b, bk, bn = dataclasses.astuple(block)
        visits, columns = _visits(m, g, b), _cut(n, bn)
        step = _multiplying(b * bk * bn, itemsize, chip) + CYCLES_PER_STEP + (_storing(2 * b * bn) if bk < k else 0)
        moved = visits * b * k * columns + (visits if bk < k else g) * k * n + m * n
        return _time(_cut(columns, chip.cores) * visits * (k // bk) * step, itemsize * moved, chip)

    sizes = (Blocks(b, bk, bn) for b in _rows(m) for bk in _sides(k) if k % bk == 0 for bn in _sides(n))
    return min((block for block in sizes if vmem(block) <= chip.vmem), key=cost)


def of_weights(m: int, k: int, n: int, g: int, itemsize: int, result_itemsize: int, kind: str) -> Blocks:
    """For the sums over rows, which are kept in float32 beside a narrower result."""

    chip = _chip(kind)

    def vmem(block: Blocks) -> int:
        b, bk, bn = dataclasses.astuple(block)
        sums = 4 if result_itemsize < 4 else 0
        return 2 * itemsize * b * (bk + bn) + (2 * result_itemsize + sums) * bk * bn

    def cost(block: Blocks) -> tuple[float, float]:
        b, bk, bn = dataclasses.astuple(block)
        visits, parts = _visits(m, g, b), _cut(k, bk) * _cut(n, bn)
        step = _multiplying(b * bk * bn, itemsize, chip) + CYCLES_PER_STEP + _storing(bk * bn)
        moved = itemsize * visits * b * (k * _cut(n, bn) + n * _cut(k, bk)) + result_itemsize * g * k * n
        return _time(_cut(parts, chip.cores) * visits * step, moved, chip)

    sizes = (Blocks(b, bk, bn) for b in _rows(m) for bk in _sides(k) for bn in _sides(n))
    return min((block for block in sizes if vmem(block) <= chip.vmem), key=cost)


def _rows(m: int) -> list[int]:
    return [b for b in ROWS if b <= m] or [m]


def _sides(size: int) -> list[int]:
    """Whole lanes that `size` divides by, or as many as a power of two."""
    lanes = size // LANES
    return [LANES * part for part in range(1, lanes + 1) if lanes % part == 0 or part & (part - 1) == 0]


def _visits(m: int, g: int, b: int) -> int:
    return _cut(m, b) + g - 1


def _cut(size: int, part: int) -> int:
    return -(-size // part)


def _chip(kind: str) -> Chip:
    return CHIPS.get(kind, CHIPS["TPU v5 lite"])


def _multiplying(products: int, itemsize: int, chip: Chip) -> float:
    return (FLOAT32_PASSES if itemsize == 4 else 1) * products / chip.products


def _storing(elements: int) -> float:
    """Cycles in which float32 is stored to VMEM, a register of 8 x 128 in each, and nothing is multiplied."""
    return elements / (8 * LANES)


def _time(cycles: float, num_bytes: int, chip: Chip) -> tuple[float, float]:
    """What takes longer, then what takes less: of two ways as fast the one that leaves more of the chip idle."""
    moving = num_bytes / chip.hbm_bytes / chip.cores
    return max(cycles, moving), min(cycles, moving)
