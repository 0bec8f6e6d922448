"""Gated DeltaNet-H2 1.3B: Mamba-2, the gated delta rule and attention in a window of 2048 by turns (arXiv:2412.06464).

    hybridlm train gated_deltanet_h2_1b --data.path=corpus/ --data.tokenizer=tokenizer.json

Published: the three mixers and the window. The authors' code has no configuration of it, so everything else is
gated_deltanet_h1_1b's, and Mamba-2 has its own published proportions (twice the width, heads of 64, a state of 128).
"""

from dataclasses import replace

from hybridlm.config import Block, Mamba2
from hybridlm.config_io import load_config

base = load_config("gated_deltanet_h1_1b")
delta, local_attention = base.model.pattern
state_space = Block(mixer=Mamba2(num_heads=2 * 2304 // 64), ffn=delta.ffn)

config = replace(base, model=replace(base.model, pattern=(state_space, delta, local_attention)))
