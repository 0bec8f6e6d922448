"""The configs of channel mixers. Imports no JAX. Use them from `hybridlm.config`."""

from dataclasses import dataclass
from typing import Literal

from hybridlm.config_check import ConfigError, Node, PositiveFloat, PositiveInt
from hybridlm.config_routers import Router, TopK


class FFN(Node):
    """Base of the configs of channel mixers."""


@dataclass(frozen=True, kw_only=True)
class GatedMLP(FFN):
    """(act(x W_gate) * x W_up) W_down (Shazeer, 2020, arXiv:2002.05202). Use one of the five named subclasses."""

    hidden: PositiveInt
    bias: bool = False


class GLU(GatedMLP):
    """act = sigmoid."""


class Bilinear(GatedMLP):
    """act = identity."""


class ReGLU(GatedMLP):
    """act = ReLU."""


class GeGLU(GatedMLP):
    """act = GELU (tanh form)."""


class SwiGLU(GatedMLP):
    """act = SiLU."""


@dataclass(frozen=True, kw_only=True)
class Dispatch(Node):
    """Base of the configs of how tokens reach their experts."""

    slices: PositiveInt = 1
    """Of devices joined by a slow network, of which the `expert` axis has so many. With more than one, tokens cross it
    in one message per slice instead of one per device (hierarchical all-to-all; Nie et al., 2022, arXiv:2203.14685)."""


@dataclass(frozen=True, kw_only=True)
class Dropless(Dispatch):
    """Tokens sorted by expert, and one grouped matmul over all of them (Gale et al., 2022, arXiv:2211.15841).

    On one device of the `expert` axis nothing is ever dropped. Over several, each device receives into a buffer of
    `buffer_factor` times its fair share of tokens; what does not fit is dropped and counted (`moe_dropped`).
    """

    buffer_factor: PositiveFloat | None = 2.0
    """Room for every token of every device when absent, which costs memory by the size of the `expert` axis."""
    exchange: Literal["ragged", "padded"] = "ragged"
    """`ragged` sends exactly the tokens there are, into one buffer; `padded` the same number to each device, so that
    `buffer_factor` bounds what one device sends to one other."""

    def check(self) -> None:
        if self.slices > 1 and self.exchange != "padded":
            raise ConfigError("exchange", f"={self.exchange!r}: must be 'padded' with slices={self.slices}")


@dataclass(frozen=True, kw_only=True)
class Capacity(Dispatch):
    """Each expert takes up to `factor` times its fair share of a group of tokens, by one-hot matmuls; the rest is
    dropped and counted (GShard, Lepikhin et al., 2020, arXiv:2006.16668). Outside training tokens are sorted as by
    `Dropless()`. Not for routers that at first send a token to all experts: most of that would be dropped."""

    factor: PositiveFloat = 1.25
    group_size: PositiveInt | None = None
    """Neighbouring tokens of one sequence; a sequence when absent."""


@dataclass(frozen=True, kw_only=True)
class MoE(FFN):
    """A mixture of experts, each a gated MLP: y = sum_e w_e(x) E_e(x) + S(x)."""

    num_experts: PositiveInt
    hidden: PositiveInt
    """Of one expert."""
    router: Router = TopK()
    dispatch: Dispatch = Dropless()
    activation: Literal["GLU", "Bilinear", "ReGLU", "GeGLU", "SwiGLU"] = "SwiGLU"
    shared_hidden: PositiveInt | None = None
    """Of the shared expert, which every token goes to; none when absent."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by sigmoid(x w), as in Qwen3-Next."""

    def check(self) -> None:
        if self.shared_gate and self.shared_hidden is None:
            raise ConfigError("shared_gate", "=True: needs shared_hidden")
        try:
            self.router.check_experts(self.num_experts)
        except ConfigError as error:
            raise error.under("router") from None
