"""Which implementation an operation takes, and why; checks of operands.

`impl` is "auto", "reference" (token by token, the oracle), "chunked" (plain JAX, efficient on every platform),
"pallas_tpu" or "pallas_gpu". A named implementation that cannot serve raises `UnsupportedKernel`; "auto" always serves.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import importlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax import Array

from hybridlm_kernels.shards import left_to_compiler
from hybridlm_kernels.target import Target, target_of

IMPLS = ("auto", "reference", "chunked", "pallas_tpu", "pallas_gpu")
PACKAGES = {
    "linear_scan": "linear_scan",
    "rg_lru": "rg_lru",
    "short_conv": "short_conv",
    "gated_linear_attention": "linear_attention",
    "gated_delta_rule": "linear_attention",
    "grouped_matmul": "grouped_matmul",
    "memory_lookup": "memory_lookup",
    "memory_scores": "memory_lookup",
}
"""Where an operation lives; the modules `pallas_tpu` and `pallas_gpu` of its package are the kernels."""
OPS = tuple(PACKAGES)
WITHOUT_TIME = ("grouped_matmul", "memory_lookup", "memory_scores")
"""Operations whose operands have no time axis."""
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
NOT_YET_RUN = {"pallas_gpu": "is compiled and interpreted in tests but has not run on a GPU yet: ask for it by name"}
"""What serves when named, and "auto" leaves alone."""
DTYPES = ("bfloat16", "float16", "float32", "float64")
COMPLEX_DTYPES = ("complex64", "complex128")

logger = logging.getLogger("hybridlm_kernels")
_interpreting = contextvars.ContextVar("interpreting", default=False)
_record: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("record", default=None)


class UnsupportedKernel(NotImplementedError):
    """The implementation asked for by name cannot serve this call."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The implementation that `op` takes and the reasons for it."""

    op: str
    impl: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.op}: {self.impl} ({'; '.join(self.reasons)})"


@dataclasses.dataclass(frozen=True)
class Tier:
    """What runs: the implementation, and whether its Pallas kernels are interpreted, which any platform can."""

    op: str
    impl: str
    interpret: bool = False
    by_name: bool = True

    def on_shard(self, *operands: Array) -> "Tier":
        """The same for the operands that one device holds, which a kernel may not serve though it serves the whole.

        Raises UnsupportedKernel where the implementation was asked for by name.
        """
        refusal = _refusal(self.op, self.impl, operands, target_of(operands)) if self.impl in PLATFORMS else None
        if refusal is None:
            return self
        if self.by_name:
            raise UnsupportedKernel(f"impl={self.impl!r}: {self.op} {refusal} on each device; use auto")
        return Tier(self.op, "chunked", by_name=False)

    def __getattr__(self, name: str) -> Any:
        """The implementation's function `name`."""
        function = getattr(tier_module(self.op, self.impl), name)
        return functools.partial(function, interpret=True) if self.interpret else function


def tier_module(op: str, impl: str) -> Any:
    """Imported when needed: Pallas takes a second, and each backend of it other libraries."""
    return importlib.import_module(f"hybridlm_kernels.{PACKAGES[op]}.{impl}")


@contextlib.contextmanager
def interpret_pallas() -> Iterator[None]:
    """Within, `impl="pallas_tpu"` runs on any platform, slowly: for tests."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def explain(
    op: str, *operands: Array | jax.ShapeDtypeStruct, impl: str = "auto", target: Target | None = None
) -> Explanation:
    """Which implementation `op` takes for its operands (arrays or `jax.ShapeDtypeStruct`s, in the order of its
    signature; time, if any, in axis 1) on `target`, and why.

    `target` is the device that the operands or the mesh in scope belong to, else the process's own.

    Raises UnsupportedKernel when `impl` names one that cannot serve, ValueError for an unknown `op` or `impl`.
    """
    if op not in OPS:
        raise ValueError(f"op={op!r}: must be one of {', '.join(OPS)}{_suggestion(op, OPS)}")
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: must be one of {', '.join(IMPLS)}{_suggestion(impl, IMPLS)}")
    target = target_of(operands) if target is None else target
    if impl == "auto":
        return Explanation(op, *_automatic(op, operands, target))
    if impl in PLATFORMS and (refusal := _refusal(op, impl, operands, target)):
        raise UnsupportedKernel(f"impl={impl!r}: {op} {refusal}; use auto")
    return Explanation(op, impl, ("asked for by name",))


def _automatic(op: str, operands: Sequence[Any], target: Target) -> tuple[str, tuple[str, ...]]:
    if operands and op not in WITHOUT_TIME and operands[0].shape[1:2] == (1,):
        return "chunked", ("one token is evaluated directly, without a loop",)
    for impl, platform in PLATFORMS.items():
        if platform == target.platform and operands:
            refusal = _refusal(op, impl, operands, target) or NOT_YET_RUN.get(impl)
            if refusal is None:
                return impl, (f"kernel for {target.kind}",)
            return "chunked", (f"{impl} {refusal}",)
    return "chunked", (f"the fastest implementation of this operation on {target.platform}",)


def _refusal(op: str, impl: str, operands: Sequence[Any], target: Target) -> str | None:
    """Why `impl` cannot serve; None where it can."""
    interpreting = _interpreting.get() and impl == "pallas_tpu"
    if PLATFORMS[impl] != target.platform and not interpreting:
        return f"runs on {PLATFORMS[impl].upper()}, and this is {target.kind}"
    if axes := left_to_compiler(operands):
        return f"cannot be divided by the compiler over {', '.join(axes)}: make these axes explicit, or use shard_map"
    if impl == "pallas_gpu":
        return tier_module(op, impl).supports(*operands, compute_capability=target.compute_capability)
    return tier_module(op, impl).supports(*operands)


@contextlib.contextmanager
def record_choices() -> Iterator[list[tuple[Explanation, list[str]]]]:
    """A list that gets, for each operation called or traced within, what it takes and the types of its operands."""
    record: list[tuple[Explanation, list[str]]] = []
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def choose(op: str, *operands: Array | jax.ShapeDtypeStruct, impl: str) -> Tier:
    """The implementation to run; the first automatic choice of each kind is logged."""
    explanation = explain(op, *operands, impl=impl)
    if (record := _record.get()) is not None:
        record.append((explanation, [str(jax.typeof(operand)) for operand in operands]))
    elif impl == "auto":
        _log_once(explanation)
    interpret = _interpreting.get() and explanation.impl == "pallas_tpu"
    return Tier(op, explanation.impl, interpret, by_name=impl != "auto")


@functools.cache
def _log_once(explanation: Explanation) -> None:
    logger.info("%s", explanation)


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def check_whole(op: str, **operands: Array) -> None:
    """Raises ValueError for an operand that is sharded, where an operation wants to be told which part it has."""
    for name, array in operands.items():
        if axes := [str(entry) for entry in jax.typeof(array).sharding.spec if entry is not None]:
            raise ValueError(f"{name}: sharded over {', '.join(axes)}; call {op} inside a jax.shard_map")


def check_operand(name: str, array: Array, shape: tuple[int, ...], dims: str, allow_complex: bool = False) -> None:
    """Raises ValueError unless `array` has this shape, named by `dims`, and a floating dtype that is supported."""
    if array.shape != shape:
        raise ValueError(f"{name}: shape {array.shape} must be {dims} = {shape}")
    known = DTYPES + COMPLEX_DTYPES if allow_complex else DTYPES
    if array.dtype.name not in known:
        raise ValueError(f"{name}: dtype {array.dtype.name} must be one of {', '.join(known)}")


def check_sequence(name: str, array: Array, dims: str = "[batch, time, channels]") -> None:
    """Raises ValueError unless `array` has as many axes as `dims` names, with at least one time step in axis 1."""
    if array.ndim != dims.count(",") + 1:
        raise ValueError(f"{name}: shape {array.shape} must be {dims}")
    if array.shape[1] == 0:
        raise ValueError(f"{name}: shape {array.shape} has no time step; at least one token is needed")
