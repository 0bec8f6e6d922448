"""Sequence mixers, one file each. A new one is one file and one line here, or one `register` call of your own."""

from hybridlm import config
from hybridlm.mixers.attention import Attention
from hybridlm.mixers.delta_product import DeltaProduct
from hybridlm.mixers.deltanet import DeltaNet
from hybridlm.mixers.gated_deltanet import GatedDeltaNet
from hybridlm.mixers.gated_linear_attention import GatedLinearAttention
from hybridlm.mixers.gated_slot_attention import GatedSlotAttention
from hybridlm.mixers.hgrn2 import HGRN2
from hybridlm.mixers.kimi_delta_attention import KimiDeltaAttention
from hybridlm.mixers.liger import Liger
from hybridlm.mixers.mamba2 import Mamba2
from hybridlm.mixers.retnet import RetNet
from hybridlm.mixers.rglru import RGLRU
from hybridlm.mixers.simple_gla import SimpleGLA
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
        config.Attention(num_heads=4, num_kv_heads=4, window=5, qk_norm=True, out_gate=True, out_bias=True),
    ),
)
register(
    config.Liger,
    Liger,
    examples=(
        config.Liger(num_heads=4, num_kv_heads=2, window=6),
        config.Liger(num_heads=4, num_kv_heads=1, head_dim=6, window=7, recurrence="simple_gla", logit_soft_cap=20.0),
        config.Liger(
            num_heads=2,
            num_kv_heads=2,
            head_dim=10,
            window=5,
            recurrence="gated_deltanet",
            window_weight=0.25,
            rope_fraction=0.5,
            qk_norm=True,
            out_gate=True,
            out_bias=True,
        ),
    ),
)
register(
    config.GatedDeltaNet,
    GatedDeltaNet,
    examples=(
        config.GatedDeltaNet(num_heads=4, head_dim=6),
        config.GatedDeltaNet(
            num_heads=2, num_value_heads=4, head_dim=8, value_head_dim=5, allow_neg_eigval=True, output_gate="sigmoid"
        ),
        config.GatedDeltaNet(num_heads=1, num_value_heads=3, head_dim=7, conv_width=None, output_gate=None),
    ),
)
register(
    config.DeltaNet,
    DeltaNet,
    examples=(
        config.DeltaNet(num_heads=4, head_dim=8),
        config.DeltaNet(num_heads=2, head_dim=6, value_head_dim=9, conv_width=None, allow_neg_eigval=True),
        config.DeltaNet(
            num_heads=3,
            head_dim=5,
            conv_width=2,
            qk_activation="elu",
            qk_norm="sum",
            use_beta=False,
            output_gate="silu",
        ),
    ),
)
register(
    config.DeltaProduct,
    DeltaProduct,
    examples=(
        config.DeltaProduct(num_heads=2, head_dim=6),
        config.DeltaProduct(
            num_heads=2, num_value_heads=4, head_dim=5, value_head_dim=4, num_householder=3, use_decay=False
        ),
        config.DeltaProduct(num_heads=1, head_dim=7, conv_width=None, allow_neg_eigval=False, output_gate=None),
    ),
)
register(
    config.KimiDeltaAttention,
    KimiDeltaAttention,
    examples=(
        config.KimiDeltaAttention(num_heads=2, head_dim=6),
        config.KimiDeltaAttention(
            num_heads=2, num_value_heads=4, head_dim=8, value_head_dim=5, decay_lower_bound=-5.0, gate_bias=False
        ),
        config.KimiDeltaAttention(num_heads=3, head_dim=5, conv_width=None, allow_neg_eigval=True),
    ),
)
register(
    config.GatedLinearAttention,
    GatedLinearAttention,
    examples=(
        config.GatedLinearAttention(num_heads=2, head_dim=8, value_head_dim=12),
        config.GatedLinearAttention(num_heads=4, head_dim=6, value_head_dim=7, gate_rank=3, decay_temperature=4.0),
    ),
)
register(
    config.SimpleGLA,
    SimpleGLA,
    examples=(
        config.SimpleGLA(num_heads=2, head_dim=8, value_head_dim=12),
        config.SimpleGLA(num_heads=4, head_dim=6, value_head_dim=7, conv_width=None),
    ),
)
register(
    config.RetNet,
    RetNet,
    examples=(
        config.RetNet(num_heads=2, head_dim=8, value_head_dim=12),
        config.RetNet(num_heads=4, head_dim=6, value_head_dim=5, rope_theta=100.0),
    ),
)
register(
    config.HGRN2,
    HGRN2,
    examples=(
        config.HGRN2(num_heads=2, head_dim=12, value_head_dim=8),
        config.HGRN2(num_heads=4, head_dim=7, value_head_dim=5, lower_bound=0.3),
    ),
)
register(
    config.GatedSlotAttention,
    GatedSlotAttention,
    examples=(
        config.GatedSlotAttention(num_heads=2, head_dim=8, value_head_dim=12, num_slots=7),
        config.GatedSlotAttention(num_heads=4, head_dim=5, value_head_dim=6, num_slots=16),
    ),
)
register(
    config.Mamba2,
    Mamba2,
    examples=(
        config.Mamba2(num_heads=4, head_dim=7, state_dim=12),
        config.Mamba2(num_heads=12, head_dim=3, state_dim=6, num_groups=3, conv_width=2, dt_low=0.1, dt_high=0.8),
    ),
)
