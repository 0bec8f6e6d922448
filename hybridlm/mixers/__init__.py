"""Sequence mixers, one file each. A new one is one file and one line here, or one `register` call of your own."""

from hybridlm import config
from hybridlm.mixers.attention import Attention
from hybridlm.mixers.rglru import RGLRU
from hybridlm.registry import Registry

MIXERS: Registry[config.Mixer] = Registry("mixer")
register = MIXERS.register

register(
    config.RGLRU,
    RGLRU,
    examples=(
        config.RGLRU(width=24, num_heads=2),
        config.RGLRU(width=24, num_heads=2, init="recurrentgemma", bias=True),
    ),
)
register(
    config.Attention,
    Attention,
    examples=(
        config.Attention(num_heads=4, num_kv_heads=2),
        config.Attention(num_heads=2, num_kv_heads=1, head_dim=12, window=7, rope_fraction=0.5, logit_soft_cap=20.0),
        config.Attention(num_heads=4, num_kv_heads=4, window=5, qk_norm=True, out_bias=True),
    ),
)
