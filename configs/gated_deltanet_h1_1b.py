"""Gated DeltaNet-H1 1.3B: the gated delta rule and attention in a window of 2048 by turns (arXiv:2412.06464).

    hybridlm train gated_deltanet_h1_1b --data.path=corpus/ --data.tokenizer=tokenizer.json

From the authors' code (NVlabs/GatedDeltaNet, GatedDeltaNet_H1_1.3B): width, depth, order, 18 heads of attention, its
window, rotary positions on whole heads, SwiGLU of 6144, a tied embedding, a vocabulary of 32,000, the norms' epsilon.
Training as gated_deltanet_1b. Our choice: 14 heads of 128 for queries and keys and 28 for values, where theirs are 9 of
192 and of 384 (9 heads do not divide over devices).
"""

from dataclasses import replace

from hybridlm.config import Attention, Block, GatedDeltaNet, SwiGLU
from hybridlm.config_io import load_config

base = load_config("gated_deltanet_1b")
ffn = SwiGLU(hidden=6144)
delta = Block(mixer=GatedDeltaNet(num_heads=14, num_value_heads=28, head_dim=128, value_head_dim=128), ffn=ffn)
local_attention = Block(mixer=Attention(num_heads=18, num_kv_heads=18, window=2048), ffn=ffn)

config = replace(
    base,
    model=replace(
        base.model,
        width=2304,
        num_layers=18,
        pattern=(delta, local_attention),
        tied_embedding=True,
        norm_eps=1e-5,
    ),
)
