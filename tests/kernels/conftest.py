"""Pallas' GPU interpreter, completed for the kernels here."""

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax.interpreters import mlir


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls `function(*operands)` with its GPU kernels interpreted, and waits for what it returns.

    A cast of layout is nothing on CPU; and the older interpreter does not know transposed operands of a product.
    """
    missing = "this JAX has no interpreter of GPU kernels"
    interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params", reason=missing)
    gpu_callbacks = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks", reason=missing)
    gpu_core = pytest.importorskip("jax._src.pallas.mosaic_gpu.core", reason=missing)
    params = interpreter.InterpretGPUParams(out_of_bounds_reads="uninitialized")

    def run(function: Callable[..., Any], *operands: Any) -> Any:
        with interpreter.force_gpu_interpret_mode(params):
            return jax.block_until_ready(function(*operands))

    mlir.register_lowering(gpu_core.layout_cast_p, lambda ctx, x, **_: [x])
    with pytest.MonkeyPatch.context() as patch:
        if jax.__version_info__ < (0, 12):
            original = gpu_callbacks._get_shared_memory
            patch.setattr(gpu_callbacks, "_get_shared_memory", lambda: Transposing(original()))
            patch.setattr(gpu_callbacks, "wgmma", functools.partial(multiply, gpu_callbacks.wgmma))
        yield run


transposed_reads = threading.local()  # of the next reads of this thread's, whether they are transposed


def multiply(product: Callable[..., Any], *, a_transforms: tuple, b_transforms: tuple, **rest: Any) -> Any:
    """`product` of refs that may be transposed: it reads first a, then b, then what it adds to."""

    def is_transpose(transform: Any) -> bool:
        return type(transform).__name__ == "TransposeTransform"

    operands = (a_transforms, b_transforms)
    transposed_reads.flags = [any(map(is_transpose, transforms)) for transforms in operands]
    plain = [tuple(t for t in transforms if not is_transpose(t)) for transforms in operands]
    return product(a_transforms=plain[0], b_transforms=plain[1], **rest)


class Transposing:
    """The interpreter's shared memory, `transposed_reads` obeyed."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def get_buffer_content(self, *args: Any, **options: Any) -> Any:
        content, *others = self.memory.get_buffer_content(*args, **options)
        flags = getattr(transposed_reads, "flags", [])
        return (content.T if flags and flags.pop(0) else content, *others)
