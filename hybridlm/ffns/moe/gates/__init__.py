"""Gates, one file each: functions from a token to one logit per expert, which most routers read.

A new one is one file and one line here, or one `register` call of your own.
"""

from hybridlm import config
from hybridlm.ffns.moe.gates.grkan import GRKANGate
from hybridlm.ffns.moe.gates.linear import LinearGate
from hybridlm.ffns.moe.gates.recurrent import RecurrentGate
from hybridlm.registry import Registry

GATES: Registry[config.Gate] = Registry("gate")
register = GATES.register

register(config.LinearGate, LinearGate, examples=(config.LinearGate(),))
register(config.RecurrentGate, RecurrentGate, examples=(config.RecurrentGate(state_dim=12),))
register(
    config.GRKANGate,
    GRKANGate,
    examples=(config.GRKANGate(hidden=6), config.GRKANGate(hidden=5, grid_size=3, spline_order=2)),
)
