"""Channel mixers, one file each. A new one is one file and one line here, or one `register` call of your own."""

from hybridlm import config
from hybridlm.ffns.gated_mlp import ACTIVATIONS, GatedMLP
from hybridlm.ffns.moe.layer import MoE
from hybridlm.registry import Registry

FFNS: Registry[config.FFN] = Registry("ffn")
register = FFNS.register

for gated in ACTIVATIONS:
    register(gated, GatedMLP, examples=(gated(hidden=48), gated(hidden=40, bias=True)))
register(
    config.MoE,
    MoE,
    examples=(
        config.MoE(num_experts=8, hidden=24),
        config.MoE(
            num_experts=4,
            hidden=16,
            router=config.TopK(k=3, score="sigmoid", bias_balance=True, scale=2.5),
            dispatch=config.Dropless(exchange="padded", buffer_factor=None),
            activation="GeGLU",
            shared_hidden=24,
            shared_gate=True,
        ),
        config.MoE(num_experts=8, hidden=16, router=config.Switch(), dispatch=config.Capacity(factor=2.0)),
    ),
)
