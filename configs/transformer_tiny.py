"""Transformer control of griffin_tiny: full attention in every layer, as many parameters.

    hybridlm train transformer_tiny --out runs/transformer_tiny

The MLP is widened until the parameters equal griffin_tiny's.
"""

from dataclasses import replace

from hybridlm.config import Attention, Block, GeGLU
from hybridlm.config_io import load_config

base = load_config("griffin_tiny")
attention = Block(mixer=Attention(num_heads=4, num_kv_heads=1, head_dim=32), ffn=GeGLU(hidden=480))

config = replace(base, model=replace(base.model, pattern=(attention,)))
