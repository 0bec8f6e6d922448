"""Qwen3-Next's pattern at 1.6 million parameters: three layers of Gated DeltaNet, then one of gated full attention.

    hybridlm train qwen3_next_style_tiny --out runs/qwen3_next_style_tiny

Published (Qwen/Qwen3-Next-80B-A3B): the pattern, two value heads to a query-key head, attention with normed queries and
keys, rotary positions on a quarter of the head and a sigmoid gate on its output. Without its experts, and everything
else is griffin_tiny's: bytes of the running Python's standard library, nothing is downloaded.
"""

from dataclasses import replace

from hybridlm.config import Attention, Block, GatedDeltaNet, SwiGLU
from hybridlm.config_io import load_config

base = load_config("griffin_tiny")
ffn = SwiGLU(hidden=320)
delta = Block(mixer=GatedDeltaNet(num_heads=2, num_value_heads=4, head_dim=32, value_head_dim=32), ffn=ffn)
attention = Block(
    mixer=Attention(num_heads=4, num_kv_heads=2, head_dim=32, rope_fraction=0.25, qk_norm=True, out_gate=True),
    ffn=ffn,
)

config = replace(
    base,
    model=replace(
        base.model, num_layers=8, pattern=(delta, delta, delta, attention), tied_embedding=False, scale_embedding=False
    ),
)
