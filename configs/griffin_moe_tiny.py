"""griffin_tiny with eight experts in place of every MLP, two of them per token: the same active parameters.

    hybridlm train griffin_moe_tiny --out runs/griffin_moe_tiny

Each expert is half as wide as griffin_tiny's MLP, so that a token costs what it costs there; the rest is griffin_tiny's.
Balance by a bias per expert (arXiv:2408.15664), and the losses of DeepSeek-V3 (arXiv:2412.19437).
"""

from dataclasses import replace

from hybridlm.config import Block, MoE, TopK
from hybridlm.config_io import load_config

base = load_config("griffin_tiny")
experts = MoE(
    num_experts=8,
    hidden=192,
    router=TopK(k=2, score="sigmoid", bias_balance=True, balance_loss=0.0, sequence_balance_loss=1e-4),
    activation="GeGLU",
)

config = replace(
    base,
    model=replace(base.model, pattern=tuple(Block(mixer=block.mixer, ffn=experts) for block in base.model.pattern)),
)
