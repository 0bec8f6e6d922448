"""griffin_tiny with eight experts in place of every MLP, two of them per token: the same active parameters.

    hybridlm train griffin_moe_tiny --out runs/griffin_moe_tiny

Each expert is half as wide as griffin_tiny's MLP, so that a token costs what it costs there. Weights of the chosen two
add up to 1, balance by Switch's loss over the batch; the rest is griffin_tiny's.
"""

from dataclasses import replace

from hybridlm.config import Block, MoE, TopK
from hybridlm.config_io import load_config

base = load_config("griffin_tiny")
experts = MoE(
    num_experts=8,
    hidden=192,
    router=TopK(k=2, balance_loss=0.01, z_loss=0.001),
    activation="GeGLU",
)

config = replace(
    base,
    model=replace(base.model, pattern=tuple(Block(mixer=block.mixer, ffn=experts) for block in base.model.pattern)),
)
