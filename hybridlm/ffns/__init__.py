"""Channel mixers, one file each. A new one is one file and one line here, or one `register` call of your own."""

from hybridlm import config
from hybridlm.ffns.gated_mlp import ACTIVATIONS, GatedMLP
from hybridlm.registry import Registry

FFNS: Registry[config.FFN] = Registry("ffn")
register = FFNS.register

for gated in ACTIVATIONS:
    register(gated, GatedMLP, examples=(gated(hidden=48), gated(hidden=40, bias=True)))
