"""The configs of routers of a mixture of experts, with their published defaults. Imports no JAX. Use them from
`hybridlm.config`.

A router says which experts each token goes to and with which weights; a gate is the function whose outputs, one logit
per expert, most routers read. Any router that has a `gate` takes any gate.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from hybridlm.config_check import (
    ConfigError,
    Fraction,
    Node,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
)


class Gate(Node):
    """Base of the configs of gates: x -> one logit per expert."""


@dataclass(frozen=True, kw_only=True)
class LinearGate(Gate):
    """x W, in float32."""


@dataclass(frozen=True, kw_only=True)
class RecurrentGate(Gate):
    """logits h_l W'_l of a state that crosses layers, h_l = GRU(x W_l, h_{l-1}) (Qiu et al., 2024, arXiv:2408.06793).

    The GRU is one for all layers with the same `state_dim`.
    """

    state_dim: PositiveInt = 256


@dataclass(frozen=True, kw_only=True)
class GRKANGate(Gate):
    """A gated residual Kolmogorov-Arnold network, then a linear map (Inzirillo and Genet, 2024, arXiv:2409.15161)."""

    hidden: PositiveInt = 64
    grid_size: PositiveInt = 5
    """Intervals of the splines' grid over [-1, 1]."""
    spline_order: PositiveInt = 3


class Router(Node):
    """Base of the configs of routers."""

    def check_experts(self, num_experts: int) -> None:
        """Raise ConfigError where the router cannot serve so many experts."""
        k = getattr(self, "k", 1)
        if k > num_experts:
            raise ConfigError("k", f"={k}: must be at most num_experts={num_experts}")

    def check_stack(self, routers: "tuple[tuple[Router, int], ...]", num_layers: int) -> None:
        """Raise ConfigError where the model lacks what the router needs.

        `routers` are those of the model's kinds of blocks, each with its number of experts; `num_layers` is how many
        layers have this one.
        """


@dataclass(frozen=True, kw_only=True)
class TopK(Router):
    """The k experts with the best scores. Mixtral, Qwen3 and, with sigmoid scores, Llama 4 and others."""

    k: PositiveInt = 2
    gate: Gate = LinearGate()
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    renormalize: bool = True
    """Weights are divided by their sum. With k = 1 they would always be 1, and only losses train the router."""
    scale: PositiveFloat = 1.0
    """Of the weights, as DeepSeek-V3's 2.5."""
    balance_loss: NonNegativeFloat = 0.01
    """Weight of x sum_e f_e P_e over the global batch: f the share of choices, P the mean score (arXiv:2101.03961)."""
    sequence_balance_loss: NonNegativeFloat = 0.0
    """The same within each sequence; DeepSeek-V3 has 1e-4."""
    z_loss: NonNegativeFloat = 0.001
    """Weight of logsumexp(logits)^2 (Zoph et al., 2022, arXiv:2202.08906)."""
    bias_balance: bool = False
    """Balance without a loss: a bias per expert that only selects is raised by `optimizer.router_bias_rate` after each
    step where the expert had too few tokens, else lowered (Wang et al., 2024, arXiv:2408.15664)."""
    num_groups: PositiveInt = 1
    """Experts are so many groups (nodes); a token chooses within the best `top_groups` of them (arXiv:2412.19437)."""
    top_groups: PositiveInt | None = None
    """All groups when absent."""

    def check(self) -> None:
        if self.top_groups is not None and self.top_groups > self.num_groups:
            raise ConfigError("top_groups", f"={self.top_groups}: must be at most num_groups={self.num_groups}")

    def check_experts(self, num_experts: int) -> None:
        super().check_experts(num_experts)
        if num_experts % self.num_groups:
            raise ConfigError("num_groups", f"={self.num_groups}: must divide num_experts={num_experts}")
        reachable = num_experts // self.num_groups * (self.top_groups or self.num_groups)
        if self.k > reachable:
            raise ConfigError(
                "k", f"={self.k}: must be at most the {reachable} experts of top_groups={self.top_groups}"
            )


@dataclass(frozen=True, kw_only=True)
class NoisyTopK(Router):
    """softmax over the k best of x W + noise softplus(x W_noise) (Shazeer et al., 2017, arXiv:1701.06538)."""

    k: PositiveInt = 4
    gate: Gate = LinearGate()
    importance_loss: NonNegativeFloat = 0.1
    """Weight of the squared coefficient of variation of the experts' summed weights."""
    load_loss: NonNegativeFloat = 0.1
    """The same of the expected numbers of tokens."""

    def check_experts(self, num_experts: int) -> None:
        if self.k >= num_experts:
            raise ConfigError(
                "k", f"={self.k}: must be below num_experts={num_experts}; the load loss reads the k+1-th logit"
            )


@dataclass(frozen=True, kw_only=True)
class Switch(Router):
    """The best expert alone, with its softmax probability as weight (Fedus et al., 2021, arXiv:2101.03961)."""

    gate: Gate = LinearGate()
    balance_loss: NonNegativeFloat = 0.01
    z_loss: NonNegativeFloat = 0.0
    jitter: Fraction = 0.01
    """In training the router's input is multiplied by noise in [1 - jitter, 1 + jitter]."""


@dataclass(frozen=True, kw_only=True)
class GShardTop2(Router):
    """The two best experts, the second at random by its weight (Lepikhin et al., 2020, arXiv:2006.16668).

    Algorithm 1: in training the second is taken with probability min(1, 2 w_2).
    """

    gate: Gate = LinearGate()
    balance_loss: NonNegativeFloat = 0.01
    random_second: bool = True

    def check_experts(self, num_experts: int) -> None:
        if num_experts < 2:
            raise ConfigError("gate", f": top-2 routing needs at least 2 experts, num_experts={num_experts}")


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(Router):
    """Each expert takes its best tokens of a sequence (Zhou et al., 2022, arXiv:2202.09368).

    In perfect balance, but whether a token is taken depends on later ones: training of a causal model leaks the future.
    Outside training each token takes the round(capacity_factor) experts with its best scores instead.
    """

    gate: Gate = LinearGate()
    capacity_factor: PositiveFloat = 2.0
    """Experts per token on average."""
    leaks_future: bool = False
    """Set it to say that you know."""

    def check_stack(self, routers: "tuple[tuple[Router, int], ...]", num_layers: int) -> None:
        if not self.leaks_future:
            raise ConfigError(
                "leaks_future",
                "=False: experts choose among all tokens of a sequence, so a causal model sees the future in training;"
                " take TopK(bias_balance=True) for balance without a loss, or set leaks_future=True",
            )


@dataclass(frozen=True, kw_only=True)
class HashRouter(Router):
    """Experts by a fixed hash of the token's id, another one in each layer (Roller et al., 2021, arXiv:2106.04426)."""

    k: PositiveInt = 1
    """Each with weight 1/k."""


@dataclass(frozen=True, kw_only=True)
class DenseToSparse(Router):
    """softmax((x W + Gumbel noise) / temperature), experts above a threshold (Nie et al., 2021, arXiv:2112.14397).

    The temperature falls, so that all experts train first and one to a few of them are left at the end.
    """

    gate: Gate = LinearGate()
    activation: Literal["identity", "sigmoid", "tanh", "gelu"] = "identity"
    """Of the logits, before the temperature: softmax(act(x W) / temperature) (Nguyen et al., 2024, arXiv:2401.13875).
    Without noise where it is not the identity."""
    threshold: Annotated[float, Range(0, 1)] = 0.001
    start_temperature: PositiveFloat = 2.0
    end_temperature: PositiveFloat = 0.3
    anneal_steps: NonNegativeInt = 3000
    max_experts: PositiveInt | None = None
    """No token goes to more; all experts when absent."""
    balance_loss: NonNegativeFloat = 0.0

    def check_experts(self, num_experts: int) -> None:
        if (self.max_experts or 1) > num_experts:
            raise ConfigError("max_experts", f"={self.max_experts}: must be at most num_experts={num_experts}")


@dataclass(frozen=True, kw_only=True)
class DSelectK(Router):
    """A mixture of k differentiable selectors, sparse in the end (Hazimeh et al., 2021, arXiv:2106.03760).

    They are products of smooth steps of binary codes, and sparse once the codes are 0 and 1.
    """

    k: PositiveInt = 2
    smooth_step: PositiveFloat = 1.0
    """Width gamma of the step between 0 and 1."""
    entropy_loss: NonNegativeFloat = 0.001
    """Weight of the selectors' mean entropy, which drives codes to 0 and 1."""

    def check_experts(self, num_experts: int) -> None:
        super().check_experts(num_experts)
        if num_experts < 2:
            raise ConfigError("k", f": selectors choose among at least 2 experts, num_experts={num_experts}")


@dataclass(frozen=True, kw_only=True)
class Comet(Router):
    """k soft decision trees over the experts, whose order is searched (Ibrahim et al., 2023, arXiv:2306.02824)."""

    k: PositiveInt = 2
    smooth_step: PositiveFloat = 1.0
    entropy_loss: NonNegativeFloat = 0.001
    search_steps: NonNegativeInt = 1000
    """Steps over which the order of the leaves is learned, by Sinkhorn's iteration at a falling temperature; fixed
    afterwards. 0 leaves the order as it is."""
    start_temperature: PositiveFloat = 1.0
    end_temperature: PositiveFloat = 0.01
    sinkhorn_steps: PositiveInt = 20

    def check_experts(self, num_experts: int) -> None:
        super().check_experts(num_experts)
        if num_experts < 2:
            raise ConfigError("k", f": trees choose among at least 2 experts, num_experts={num_experts}")


@dataclass(frozen=True, kw_only=True)
class AdaptiveTopK(Router):
    """One expert where it leads by more than a threshold, else two (Li et al., 2023, arXiv:2310.07188)."""

    gate: Gate = LinearGate()
    threshold: Fraction = 0.1
    balance_loss: NonNegativeFloat = 0.01
    """Of the choices of tokens with one expert."""

    def check_experts(self, num_experts: int) -> None:
        if num_experts < 2:
            raise ConfigError("threshold", f": adaptive routing needs at least 2 experts, num_experts={num_experts}")


@dataclass(frozen=True, kw_only=True)
class PreGated(Router):
    """Each layer's router chooses for the next layer that has one (Hwang et al., 2023, arXiv:2308.12066).

    So the next layer's experts can be fetched meanwhile. The first layer's choice serves the first two.
    """

    router: Router = TopK()

    def check(self) -> None:
        if isinstance(self.router, PreGated):
            raise ConfigError("router", ": a pre-gated router cannot hold another one")

    def check_experts(self, num_experts: int) -> None:
        try:
            self.router.check_experts(num_experts)
        except ConfigError as error:
            raise error.under("router") from None

    def check_stack(self, routers: "tuple[tuple[Router, int], ...]", num_layers: int) -> None:
        if num_layers < 2:
            raise ConfigError("router", ": needs a layer to choose for; give at least 2 layers this router")
        if len({pair for pair in routers if isinstance(pair[0], PreGated)}) > 1:
            raise ConfigError("router", ": all pre-gated layers of a model must have the same router and num_experts")
        try:
            self.router.check_stack(routers, num_layers)
        except ConfigError as error:
            raise error.under("router") from None
