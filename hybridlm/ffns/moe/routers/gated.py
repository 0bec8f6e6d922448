"""What routers that read a gate have in common."""

from typing import Any

from flax import nnx

from hybridlm.ffns.moe.gates import GATES
from hybridlm.mixers.base import Carry, Context


class GatedRouter(nnx.Module):
    """Holds the gate of its config, and brings along what the gate needs of the stack."""

    def __init__(self, cfg: Any, num_experts: int, context: Context, rngs: nnx.Rngs):
        self.cfg, self.num_experts = cfg, num_experts
        self.gate = GATES.module_of(cfg.gate)(cfg.gate, num_experts, context, rngs)

    @staticmethod
    def init_carry(cfg: Any, num_experts: int, context: Context, batch: int, length: int) -> Carry:
        """What the first layer finds in the carry."""
        return carry_of(GATES.module_of(cfg.gate), cfg.gate, num_experts, context, batch, length)

    @staticmethod
    def shared(cfg: Any, num_experts: int, context: Context, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """Modules of all layers."""
        return shared_of(GATES.module_of(cfg.gate), cfg.gate, num_experts, context, rngs)

    @staticmethod
    def flops(cfg: Any, num_experts: int, context: Context) -> int:
        return GATES.module_of(cfg.gate).flops(cfg.gate, num_experts, context)


def carry_of(module: Any, cfg: Any, num_experts: int, context: Context, batch: int, length: int) -> Carry:
    """`init_carry` of a gate or router, which may have none."""
    init_carry = getattr(module, "init_carry", None)
    return {} if init_carry is None else init_carry(cfg, num_experts, context, batch, length)


def shared_of(module: Any, cfg: Any, num_experts: int, context: Context, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    """`shared` of a gate or router, which may have none."""
    shared = getattr(module, "shared", None)
    return {} if shared is None else shared(cfg, num_experts, context, rngs)
