"""The configs of sequence mixers, each with its published defaults. Imports no JAX. Use them from `hybridlm.config`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from hybridlm.config_check import ConfigError, Fraction, Node, NonNegativeFloat, PositiveFloat, PositiveInt, Range


class Mixer(Node):
    """Base of the configs of sequence mixers."""


@dataclass(frozen=True, kw_only=True)
class RGLRU(Mixer):
    """Griffin's recurrent block: gated short convolution and RG-LRU (De et al., 2024, arXiv:2402.19427)."""

    width: PositiveInt
    """Channels of the recurrence, about 4/3 of the model width in the paper."""
    num_heads: PositiveInt
    """Blocks of the block-diagonal gate matrices."""
    conv_width: PositiveInt = 4
    init: Literal["paper", "recurrentgemma"] = "paper"
    """Where decays start with the gate open: `paper` in [0.9, 0.999], `recurrentgemma` in [0.9^8, 0.999^8]."""
    bias: bool = False
    """Biases on the three linear projections, as RecurrentGemma has them."""

    def check(self) -> None:
        if self.width % self.num_heads:
            raise ConfigError("width", f"={self.width}: must divide by num_heads={self.num_heads}")


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(Node):
    """Rotary positions stretched for longer contexts, the slower the frequency the more (Llama 3.1, arXiv:2407.21783).

    Wavelengths above `original_length / low_frequency` become `factor` times as long, those below `original_length /
    high_frequency` stay; between them frequencies are interpolated.
    """

    factor: PositiveFloat = 8.0
    low_frequency: PositiveFloat = 1.0
    high_frequency: PositiveFloat = 4.0
    original_length: PositiveInt = 8192
    """Tokens of the context before."""

    def check(self) -> None:
        if self.high_frequency <= self.low_frequency:
            raise ConfigError("high_frequency", f"={self.high_frequency}: must be above {self.low_frequency}")


@dataclass(frozen=True, kw_only=True)
class Attention(Mixer):
    """Causal softmax attention; local when `window` is set. MQA and GQA by `num_kv_heads`."""

    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt | None = None
    """Model width / num_heads when absent."""
    window: PositiveInt | None = None
    """A token sees itself and the `window - 1` tokens before it; all of its document when absent."""
    rope_fraction: Fraction = 1.0
    """Share of each head that is rotated; 0 switches rotary positions off."""
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: Llama3Rope | None = None
    logit_soft_cap: PositiveFloat | None = None
    qk_norm: bool = False
    out_gate: bool = False
    """Outputs are multiplied by sigmoid(W_g x), as in Qwen3-Next."""
    out_bias: bool = False
    qkv_bias: bool = False
    """Of queries, keys and values, as in Qwen2."""

    def check(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError("num_heads", f"={self.num_heads}: must divide by num_kv_heads={self.num_kv_heads}")


@dataclass(frozen=True, kw_only=True)
class Liger(Mixer):
    """A gated linear recurrence and local attention with one set of weights, those of an `Attention` (Lan et al., 2025,
    arXiv:2503.01496). The fields of both configs mean the same; `hybridlm linearize` makes it of one.
    """

    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt | None = None
    """Model width / num_heads when absent."""
    window: PositiveInt = 64
    """Of the local attention: a token sees itself and the `window - 1` tokens before it."""
    recurrence: Literal["gla", "simple_gla", "gated_deltanet"] = "gla"
    """`gla`, as published, has a decay per channel of the key; the others, which are ours, one per head."""
    window_weight: Fraction = 0.5
    """Of the local attention in the output; the recurrence has the rest."""
    decay_temperature: PositiveFloat = 16.0
    """Decays are sigmoid(z)^(1 / temperature)."""
    rope_fraction: Fraction = 1.0
    """Of the local attention; the recurrence has no rotary positions."""
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: Llama3Rope | None = None
    logit_soft_cap: PositiveFloat | None = None
    qk_norm: bool = False
    out_gate: bool = False
    out_bias: bool = False
    qkv_bias: bool = False

    def check(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError("num_heads", f"={self.num_heads}: must divide by num_kv_heads={self.num_kv_heads}")


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(Mixer):
    """The delta rule with one decay per head (Yang et al., 2024, arXiv:2412.06464)."""

    num_heads: PositiveInt
    """Of queries and keys."""
    num_value_heads: PositiveInt | None = None
    """A multiple of `num_heads`, and `num_heads` when absent. Neighbours share a query-key head."""
    head_dim: PositiveInt = 256
    """Of queries and keys."""
    value_head_dim: PositiveInt | None = None
    """Twice `head_dim` when absent."""
    conv_width: PositiveInt | None = 4
    """Of the convolutions on queries, keys and values; none when absent."""
    allow_neg_eigval: bool = False
    """beta in (0, 2) instead of (0, 1) (Grazzi et al., 2024, arXiv:2411.12537)."""
    output_gate: Literal["silu", "sigmoid"] | None = "silu"

    def check(self) -> None:
        check_value_heads(self.num_heads, self.num_value_heads)


@dataclass(frozen=True, kw_only=True)
class DeltaNet(Mixer):
    """The delta rule without decay (Yang et al., 2024, arXiv:2406.06484)."""

    num_heads: PositiveInt
    head_dim: PositiveInt
    """Of queries and keys; heads make up the model width as published."""
    value_head_dim: PositiveInt | None = None
    """`head_dim` when absent."""
    conv_width: PositiveInt | None = 4
    """Of the convolutions on queries, keys and values; none when absent."""
    qk_activation: Literal["silu", "relu", "elu"] | None = "silu"
    """Of queries and keys, `elu` plus 1; values have SiLU."""
    qk_norm: Literal["l2", "sum"] = "l2"
    """Queries and keys are divided by the root of their squares' sum, or by the sum of their absolute values."""
    use_beta: bool = True
    """beta is 1 (2 with `allow_neg_eigval`) when off."""
    allow_neg_eigval: bool = False
    """beta in (0, 2) instead of (0, 1) (Grazzi et al., 2024, arXiv:2411.12537)."""
    output_gate: Literal["silu", "sigmoid"] | None = None


@dataclass(frozen=True, kw_only=True)
class DeltaProduct(Mixer):
    """Several delta rule steps per token (Siems et al., 2025, arXiv:2502.10297)."""

    num_heads: PositiveInt
    """Of queries and keys."""
    num_householder: PositiveInt = 2
    """Steps per token, each with a key, a value and a beta of its own."""
    num_value_heads: PositiveInt | None = None
    """A multiple of `num_heads`, and `num_heads` when absent. Neighbours share a query-key head."""
    head_dim: PositiveInt = 256
    """Of queries and keys."""
    value_head_dim: PositiveInt | None = None
    """Twice `head_dim` when absent."""
    conv_width: PositiveInt | None = 4
    """Of the convolutions on queries, keys and values; none when absent."""
    allow_neg_eigval: bool = True
    """beta in (0, 2) instead of (0, 1) (Grazzi et al., 2024, arXiv:2411.12537)."""
    use_decay: bool = True
    """One decay per head and token (Gated DeltaProduct)."""
    output_gate: Literal["silu", "sigmoid"] | None = "silu"

    def check(self) -> None:
        check_value_heads(self.num_heads, self.num_value_heads)


@dataclass(frozen=True, kw_only=True)
class KimiDeltaAttention(Mixer):
    """The delta rule with one decay per channel of the key (Kimi Linear, 2025, arXiv:2510.26692)."""

    num_heads: PositiveInt
    """Of queries and keys."""
    num_value_heads: PositiveInt | None = None
    """A multiple of `num_heads`, and `num_heads` when absent. Neighbours share a query-key head."""
    head_dim: PositiveInt = 128
    """Of queries and keys."""
    value_head_dim: PositiveInt | None = None
    """`head_dim` when absent."""
    conv_width: PositiveInt | None = 4
    """Of the convolutions on queries, keys and values; none when absent."""
    allow_neg_eigval: bool = False
    """beta in (0, 2) instead of (0, 1) (Grazzi et al., 2024, arXiv:2411.12537)."""
    decay_lower_bound: Annotated[float, Range(high=0)] | None = None
    """No log decay falls below it: bound * sigmoid(A (f + b)) instead of -A softplus(f + b); published with -5."""
    gate_bias: bool = True
    """Of the output gate's second matrix; Kimi Linear's checkpoints have none."""

    def check(self) -> None:
        check_value_heads(self.num_heads, self.num_value_heads)


def check_value_heads(num_heads: int, num_value_heads: int | None) -> None:
    """Raise ConfigError where value heads do not divide among the query-key heads."""
    if num_value_heads is not None and num_value_heads % num_heads:
        raise ConfigError("num_value_heads", f"={num_value_heads}: must be a multiple of num_heads={num_heads}")


@dataclass(frozen=True, kw_only=True)
class GatedLinearAttention(Mixer):
    """Gated linear attention, a decay per channel of the keys (Yang et al., 2023, arXiv:2312.06635)."""

    num_heads: PositiveInt = 4
    head_dim: PositiveInt
    """Of queries and keys; the paper takes half of model width / num_heads."""
    value_head_dim: PositiveInt
    """The paper takes model width / num_heads."""
    gate_rank: PositiveInt = 16
    """Of the product of two matrices that makes the decays."""
    decay_temperature: PositiveFloat = 16.0
    """Decays are sigmoid(z)^(1 / temperature)."""


@dataclass(frozen=True, kw_only=True)
class SimpleGLA(Mixer):
    """Gated linear attention with one decay per head, as flash-linear-attention's layer of that name has it."""

    num_heads: PositiveInt = 4
    head_dim: PositiveInt
    """Of queries and keys; published: model width / num_heads."""
    value_head_dim: PositiveInt
    """Published: model width / num_heads."""
    decay_temperature: PositiveFloat = 16.0
    """Decays are sigmoid(z)^(1 / temperature)."""
    conv_width: PositiveInt | None = 4
    """Taps of the convolutions over queries, keys and values; without them, and without their SiLU, when absent."""


@dataclass(frozen=True, kw_only=True)
class RetNet(Mixer):
    """Multi-scale retention: fixed decays, rotary positions (Sun et al., 2023, arXiv:2307.08621)."""

    num_heads: PositiveInt = 8
    head_dim: PositiveInt
    """Of queries and keys; the paper takes model width / num_heads."""
    value_head_dim: PositiveInt
    """The paper takes twice `head_dim`."""
    rope_theta: PositiveFloat = 10_000.0


@dataclass(frozen=True, kw_only=True)
class HGRN2(Mixer):
    """Gated linear RNN with state expansion: the key is what the decay leaves (Qin et al., 2024, arXiv:2404.07904)."""

    num_heads: PositiveInt
    """Published: model width / 128."""
    head_dim: PositiveInt = 128
    """Of queries and decays: the factor by which the state is larger than the values."""
    value_head_dim: PositiveInt = 128
    lower_bound: Annotated[float, Range(0, 1 - 2**-10)] = 0.0
    """Of the decays, where training starts; it is learned per channel, unless it is 0. Deeper blocks should have a
    larger one: the paper's grow from 0 in the first of L layers by 1 / L each."""
    norm_eps: PositiveFloat = 1e-5
    """Of the output's norm; flash-linear-attention has this number whatever the model's is."""


@dataclass(frozen=True, kw_only=True)
class GatedSlotAttention(Mixer):
    """Softmax attention over a fixed number of slots that forget (Zhang et al., 2024, arXiv:2409.07146)."""

    num_heads: PositiveInt = 4
    head_dim: PositiveInt
    """Of queries and keys; the paper takes model width / num_heads."""
    value_head_dim: PositiveInt
    """The paper takes model width / num_heads."""
    num_slots: PositiveInt = 64
    """Per head."""
    decay_temperature: PositiveFloat = 8.0
    """Decays are sigmoid(z)^(1 / temperature)."""
    norm_eps: PositiveFloat = 1e-5
    """Of the output's norm; flash-linear-attention has this number whatever the model's is."""


@dataclass(frozen=True, kw_only=True)
class Mamba2(Mixer):
    """State space duality: one decay per head, input-dependent steps (Dao and Gu, 2024, arXiv:2405.21060)."""

    num_heads: PositiveInt
    """Published: 2 * model width / head_dim."""
    head_dim: PositiveInt = 64
    """Channels per head: the value dim."""
    state_dim: PositiveInt = 128
    """N of the paper: the key dim."""
    num_groups: PositiveInt = 1
    """Heads share B and C in so many groups of neighbours, and are normed over a group."""
    conv_width: PositiveInt = 4
    dt_low: NonNegativeFloat = 0.0
    """Steps are kept at or above this."""
    dt_high: PositiveFloat | None = None
    """Steps are kept at or below this; not bounded when absent."""

    def check(self) -> None:
        if self.num_heads % self.num_groups:
            raise ConfigError("num_heads", f"={self.num_heads}: must divide by num_groups={self.num_groups}")
        if self.dt_high is not None and self.dt_high <= self.dt_low:
            raise ConfigError("dt_high", f"={self.dt_high}: must be above dt_low={self.dt_low}")
