"""Kimi Linear's pattern at 1.7 million parameters: three layers of Kimi delta attention, then one of full attention.

    hybridlm train kimi_linear_style_tiny --out runs/kimi_linear_style_tiny

Published (arXiv:2510.26692): the pattern, a decay per channel, attention without positions. Without its experts and its
latent attention, and everything else is qwen3_next_style_tiny's.
"""

from dataclasses import replace

from hybridlm.config import Attention, Block, KimiDeltaAttention
from hybridlm.config_io import load_config

base = load_config("qwen3_next_style_tiny")
ffn = base.model.pattern[0].ffn
delta = Block(mixer=KimiDeltaAttention(num_heads=4, head_dim=32), ffn=ffn)
attention = Block(mixer=Attention(num_heads=4, num_kv_heads=4, head_dim=32, rope_fraction=0.0), ffn=ffn)

config = replace(base, model=replace(base.model, pattern=(delta, delta, delta, attention)))
