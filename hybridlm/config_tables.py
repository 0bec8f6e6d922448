"""The configs of optimizers of memory tables. Imports no JAX. Use them from `hybridlm.config`."""

from dataclasses import dataclass
from typing import Literal

from hybridlm.config_check import ConfigError, Fraction, Node, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class TableOptimizer(Node):
    """Base of the configs of optimizers that change only those rows of a table which a step uses.

    Weight decay never applies. The new rows of a bfloat16 table are rounded stochastically.
    """

    lr: PositiveFloat | None = None
    """A constant learning rate of its own, as in PKM and Memory+ (1e-3); else the model's rate is multiplied."""
    multiplier: PositiveFloat = 1.0
    """Of the model's learning rate, at the first step."""
    final_multiplier: PositiveFloat | None = None
    """At the last step, reached linearly (UltraMem: from 10 to 1); the same as at the first when absent."""
    clip_norm: PositiveFloat | None = None
    """Clip the table's gradient by its norm, apart from other parameters (Memory+). Costs a second pass over the used
    rows, to know the norm."""

    def check(self) -> None:
        if self.lr is not None and (self.multiplier != 1.0 or self.final_multiplier is not None):
            raise ConfigError("lr", f"={self.lr}: is constant; leave it out, or multiplier and final_multiplier")


@dataclass(frozen=True, kw_only=True)
class RowAdam(TableOptimizer):
    """Adam whose moments of a row advance only in the steps that use it; bias correction counts all steps.

    The semantics of torch.optim.SparseAdam. Keeps two moments of every element: 8 bytes per element of the table, 6
    with a bfloat16 first moment.
    """

    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def check(self) -> None:
        super().check()
        for name in ("b1", "b2"):
            if getattr(self, name) == 1:
                raise ConfigError(name, "=1: must be below 1, for moments to move")


@dataclass(frozen=True, kw_only=True)
class RowAdagrad(TableOptimizer):
    """Row-wise Adagrad: a_r += mean(g_r^2), row -= lr g_r / (sqrt(a_r) + eps), as FBGEMM has it.

    Keeps one float32 number per row: 4 bytes per row of the table.
    """

    eps: PositiveFloat = 1e-8
