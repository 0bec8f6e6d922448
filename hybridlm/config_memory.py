"""The configs of memory layers. Imports no JAX. Use them from `hybridlm.config`."""

import math
from dataclasses import dataclass
from typing import Literal

from hybridlm.config_check import ConfigError, NonNegativeFloat, PositiveInt
from hybridlm.config_ffns import FFN, GatedMLP


@dataclass(frozen=True, kw_only=True)
class Memory(FFN):
    """Base of the configs of memory layers: of a table of rows, each token reads the few whose keys suit it best.

    A row has two half keys, of which there are sqrt(num_rows) each, so that finding the best rows costs no more than
    comparing with the half keys. Layers with equal configs read tables of the same kind, each layer its own or shared.
    """

    num_rows: PositiveInt = 1024**2
    """Of one table; a square."""
    top_k: PositiveInt = 32
    """Rows that one head reads."""
    num_tables: PositiveInt | None = None
    """Tables for all layers with this config; neighbouring layers share one. One for each layer when absent."""
    table_dtype: Literal["float32", "bfloat16"] = "float32"
    """What rows are kept in. Updates of bfloat16 rows are rounded stochastically."""
    spread: Literal["auto", "rows", "columns", "grid"] = "auto"
    """How the table lies on the mesh axes fsdp and expert: its rows over both, its columns (the value dimension) over
    both in blocks of 128 or a multiple, or rows over fsdp and columns over expert; `auto` sends the fewest bytes. Over
    tensor it is cut by rows."""

    def check(self) -> None:
        if self.num_rows != self.half_keys**2:
            near = f"{self.half_keys**2} or {(self.half_keys + 1) ** 2}"
            raise ConfigError("num_rows", f"={self.num_rows}: must be a square, as {near}: rows have two half keys")
        if self.top_k > self.searched_keys:
            raise ConfigError("top_k", f"={self.top_k}: must be at most the {self.searched_keys} half keys of an axis")

    @property
    def half_keys(self) -> int:
        return math.isqrt(self.num_rows)

    @property
    def searched_keys(self) -> int:
        """Half keys of one axis that the search goes through."""
        return self.half_keys


@dataclass(frozen=True, kw_only=True)
class ProductKeyMemory(Memory):
    """y = sum over heads and their best rows of softmax(score) value (Lample et al., 2019, arXiv:1907.05242)."""

    num_rows: PositiveInt = 512**2
    num_heads: PositiveInt = 4
    """Each with its own query and keys; they share the values."""
    key_dim: PositiveInt = 256
    """Of a query; its halves meet the half keys."""
    query_norm: Literal["batch", "layer", "none"] = "batch"
    """Over the real tokens of the batch, as published, with running statistics outside training; or of each query."""

    def check(self) -> None:
        super().check()
        check_halves(self.key_dim)


@dataclass(frozen=True, kw_only=True)
class MemoryPlus(Memory):
    """(M(x) * silu(x W_1)) W_2 with the product-key memory M, one table for all layers (Berges et al., 2024,
    arXiv:2412.09764)."""

    num_tables: PositiveInt | None = 1
    num_heads: PositiveInt = 4
    key_dim: PositiveInt | None = None
    """Half the model width when absent."""
    value_dim: PositiveInt | None = None
    """Of a row; the model width when absent."""
    qk_norm: bool = False
    """RMSNorm of queries and keys, for models that become unstable."""

    def check(self) -> None:
        super().check()
        if self.key_dim is not None:
            check_halves(self.key_dim)


@dataclass(frozen=True, kw_only=True)
class PEER(Memory):
    """A mixture of single-neuron experts: y = sum softmax(score) gelu(u . x) v, u and v rows of two tables (He, 2024,
    arXiv:2407.04153)."""

    top_k: PositiveInt = 16
    num_heads: PositiveInt = 8
    """Each with its own query; they share keys and experts."""
    key_dim: PositiveInt = 128
    """Ours."""
    query_norm: Literal["batch", "layer", "none"] = "batch"

    def check(self) -> None:
        super().check()
        check_halves(self.key_dim)


@dataclass(frozen=True, kw_only=True)
class UltraMem(Memory):
    """Scores by a Tucker decomposition, values expanded by projectors, no softmax (Huang et al., 2025,
    arXiv:2411.12364). Published beside the MLP, a few blocks later: `Beside(memory=UltraMem(), held=True)`."""

    top_k: PositiveInt = 42
    """Ours."""
    key_dim: PositiveInt | None = None
    """Of a half query, which ranks and heads share; half the model width when absent."""
    value_dim: PositiveInt | None = None
    """Of a row; half the model width when absent."""
    num_heads: PositiveInt = 2
    """Sets of keys; they share one query."""
    tucker_rank: PositiveInt = 2
    num_cores: PositiveInt = 2
    """Each scores its own block of a value's columns; their sum selects."""
    expansion: PositiveInt = 4
    """Virtual tables per table, each with its own projector; a square."""
    tucker_loss: NonNegativeFloat = 1e-3
    """Weight of the loss on the cores' singular values but the first, which the search does without."""
    tucker_margin: NonNegativeFloat = 0.15
    """Singular values below it cost nothing."""

    def check(self) -> None:
        if math.isqrt(self.expansion) ** 2 != self.expansion:
            raise ConfigError("expansion", f"={self.expansion}: must be a square, as both axes of keys grow alike")
        super().check()
        if self.value_dim is not None and self.value_dim % self.num_cores:
            raise ConfigError("value_dim", f"={self.value_dim}: must divide by num_cores={self.num_cores}")

    @property
    def searched_keys(self) -> int:
        return self.half_keys * math.isqrt(self.expansion)


@dataclass(frozen=True, kw_only=True)
class Beside(FFN):
    """A memory beside an MLP: y = F(x) + M(x)."""

    ffn: GatedMLP
    memory: Memory
    held: bool = False
    """What the memory gives is added by the next block with `AddHeld` instead, so that its reads may take that long."""


@dataclass(frozen=True, kw_only=True)
class AddHeld(FFN):
    """y = F(x) + what the `Beside` with `held` in an earlier block read (skip-layer placement, arXiv:2411.12364)."""

    ffn: GatedMLP


def check_halves(key_dim: int) -> None:
    if key_dim % 2:
        raise ConfigError("key_dim", f"={key_dim}: must be even, as each half meets its own keys")
