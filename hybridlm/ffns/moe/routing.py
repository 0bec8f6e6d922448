"""What routers receive and return, and what they share: selection, losses, statistics of balance.

All of it runs inside a `jax.shard_map` with the tokens of one device; `total` adds up over devices what concerns the
batch. Letters: b batch, t time, d model width, n tokens (b t), x experts, k experts per token.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from hybridlm.ffns.base import Aux, Pass
from hybridlm.mixers.base import Carry, Context
from hybridlm.sharding import axis_size, position, total


class Tokens(NamedTuple):
    """One device's tokens, as a router sees them."""

    x: Float[Array, "n d"]
    """Normed inputs of the layer, in the activations' dtype."""
    real: Bool[Array, " n"]
    """False at padding, which goes to no expert and counts in no statistic."""
    length: int
    """Tokens of one sequence: rows i length to (i + 1) length are sequence i."""


class Routing(NamedTuple):
    """Where each token goes."""

    experts: Int[Array, "n k"]
    """Distinct within a token; the number of experts itself stands for none."""
    weights: Float[Array, "n k"]
    """float32; 0 where there is no expert."""


class Gate(Protocol):
    """One logit per expert. Made as `Gate(cfg, num_experts, context, rngs)`."""

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Float[Array, "n x"], Carry]:
        """float32 logits."""
        ...

    @staticmethod
    def flops(cfg: Any, num_experts: int, context: Context) -> int:
        """Forward matmul FLOPs per token."""
        ...


class Router(Protocol):
    """Chooses experts. Made as `Router(cfg, num_experts, context, rngs)`; its parameters are replicated.

    Gates and routers may also have `init_carry(cfg, num_experts, context, batch, length) -> Carry` and
    `shared(cfg, num_experts, context, rngs)`, as in `hybridlm.ffns.base.FFN`.
    """

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        """Padding goes to no expert (`only_real`); nothing after a router looks for it. Losses are named `..._loss`."""
        ...

    @staticmethod
    def slots(cfg: Any, num_experts: int) -> int:
        """The most experts that a token may have: how wide a `Routing` is at most."""
        ...

    @staticmethod
    def experts_per_token(cfg: Any, num_experts: int) -> float:
        """On average and after training, for counts of FLOPs."""
        ...

    @staticmethod
    def flops(cfg: Any, num_experts: int, context: Context) -> int:
        """Forward matmul FLOPs per token."""
        ...


def only_real(routing: Routing, real: Bool[Array, " n"], num_experts: int) -> Routing:
    """`routing` with padding going nowhere."""
    experts, weights = routing
    return Routing(jnp.where(real[:, None], experts, num_experts), jnp.where(real[:, None], weights, 0.0))


def dense_routing(weights: Float[Array, "n x"], real: Bool[Array, " n"], slots: int) -> Routing:
    """The `slots` experts of each token with the largest weights; those with weight 0 are none."""
    num_experts = weights.shape[1]
    weights, experts = jax.lax.top_k(weights, slots)
    return only_real(Routing(jnp.where(weights > 0.0, experts, num_experts), weights), real, num_experts)


def noise_key(given: Pass) -> Key[Array, ""]:
    """Of the noise on this layer's tokens; it differs between devices that have different ones."""
    return jax.random.fold_in(given.layer_key(), position("batch"))


def expert_counts(experts: Int[Array, "n k"], num_experts: int) -> Int[Array, " x"]:
    """Tokens of this device that go to each expert."""
    # Compared and summed in one pass; a TPU adds to elements one after the other.
    return jnp.sum(experts.reshape(-1, 1) == jnp.arange(num_experts), axis=0, dtype=jnp.int32)


@jax.custom_vjp
def report_load(
    weights: Float[Array, "n k"], bias: Float[Array, " x"], excess: Float[Array, " x"]
) -> Float[Array, "n k"]:
    """`weights`; the gradient of `bias` is `excess`, which is no derivative but what moves biases that balance experts.

    `excess` is the load of this device's experts over their mean. As a gradient it is added up over devices,
    microbatches and nothing else; the optimizer reads its sign.
    """
    return weights


def _report_forward(
    weights: Float[Array, "n k"], bias: Float[Array, " x"], excess: Float[Array, " x"]
) -> tuple[Float[Array, "n k"], Float[Array, " x"]]:
    return weights, excess


def _report_backward(
    excess: Float[Array, " x"], d_weights: Float[Array, "n k"]
) -> tuple[Float[Array, "n k"], Float[Array, " x"], Float[Array, " x"]]:
    # Devices along the tensor axis have the same tokens, and gradients are added up over all devices.
    return d_weights, excess / axis_size("mlp"), jnp.zeros_like(excess)


report_load.defvjp(_report_forward, _report_backward)


def balance_loss(scores: Float[Array, "n x"], experts: Int[Array, "n k"], real: Bool[Array, " n"]) -> Float[Array, ""]:
    """x sum_e f_e P_e over the global batch (Fedus et al., 2021, arXiv:2101.03961, eq. 4); 1 in balance.

    f_e is the share of all choices that expert e got, P_e its mean score over tokens. Over the whole batch, not a
    device's part of it, experts may specialise by sequence (Qiu et al., 2025, arXiv:2501.11873).
    """
    num_experts = scores.shape[-1]
    counts = total(expert_counts(experts, num_experts), "batch")
    share = counts / jnp.maximum(jnp.sum(counts), 1)
    mean_score = mean_over(scores, real)
    return num_experts * jnp.sum(jax.lax.stop_gradient(share) * mean_score)


def sequence_balance_loss(
    scores: Float[Array, "n x"], experts: Int[Array, "n k"], real: Bool[Array, " n"], length: int
) -> Float[Array, ""]:
    """The mean over sequences of the same within each (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20)."""
    n, num_experts = scores.shape
    chosen = jnp.zeros((n, num_experts)).at[jnp.arange(n)[:, None], experts].add(1.0, mode="drop")

    def per_sequence(x: Float[Array, "n x"]) -> Float[Array, "b x"]:
        return jnp.sum(jnp.where(real[:, None], x, 0.0).reshape(-1, length, num_experts), axis=1)

    choices, summed = per_sequence(chosen), per_sequence(scores)
    share = choices / jnp.maximum(jnp.sum(choices, axis=1, keepdims=True), 1.0)
    tokens = jnp.sum(real.reshape(-1, length), axis=1)
    losses = num_experts * jnp.sum(jax.lax.stop_gradient(share) * summed, axis=1) / jnp.maximum(tokens, 1)
    return total(jnp.sum(losses), "batch") / jnp.maximum(total(jnp.sum(tokens > 0), "batch"), 1)


def z_loss(logits: Float[Array, "n x"], real: Bool[Array, " n"]) -> Float[Array, ""]:
    """Mean of logsumexp(logits)^2 (Zoph et al., 2022, arXiv:2202.08906, eq. 5)."""
    return mean_over(jnp.square(jax.nn.logsumexp(logits, axis=-1)), real)


def mean_over(values: Float[Array, "n *x"], real: Bool[Array, " n"]) -> Float[Array, "*x"]:
    """Mean over the real tokens of the whole batch."""
    mask = real.reshape(-1, *(1,) * (values.ndim - 1))
    tokens = jnp.maximum(total(jnp.sum(real), "batch"), 1)
    return total(jnp.sum(jnp.where(mask, values, 0.0), axis=0), "batch") / tokens


def statistics(experts: Int[Array, "n k"], real: Bool[Array, " n"], num_experts: int) -> Aux:
    """How even the choice of experts is, over the whole batch."""
    counts = total(expert_counts(experts, num_experts), "batch")
    choices = jnp.maximum(jnp.sum(counts), 1)
    share = counts / choices
    entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)))
    return {
        "moe_max_load": num_experts * jnp.max(share),  # of the busiest expert, over the mean
        "moe_min_load": num_experts * jnp.min(share),
        "moe_load_entropy": entropy / jnp.log(max(num_experts, 2)),  # 1 is balance
        "moe_experts_per_token": choices / jnp.maximum(total(jnp.sum(real), "batch"), 1),
    }
