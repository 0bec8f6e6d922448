"""DeltaNet with negative eigenvalues at 1.3 million parameters: beta in (0, 2) in every layer (arXiv:2411.12537).

    hybridlm train deltanet_neg_tiny --out runs/deltanet_neg_tiny

A state that can flip signs keeps track of parity and of permutations; one with beta in (0, 1), which is
`--model.pattern.0.mixer.allow_neg_eigval=false`, cannot. Everything but the pattern is griffin_tiny's.
"""

from dataclasses import replace

from hybridlm.config import Block, DeltaNet, SwiGLU
from hybridlm.config_io import load_config

base = load_config("griffin_tiny")
delta = Block(mixer=DeltaNet(num_heads=4, head_dim=32, allow_neg_eigval=True), ffn=SwiGLU(hidden=384))

config = replace(base, model=replace(base.model, pattern=(delta,)))
