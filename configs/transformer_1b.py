"""Transformer control of griffin_1b: full multi-query attention in every layer, as many parameters.

    hybridlm train transformer_1b --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/transformer_1b

The MQA baseline of De et al. (2024, arXiv:2402.19427) at 1.3B, with an MLP widened from 6144 to 6912: the baseline
has 9 % fewer parameters than Griffin, this has 0.7 % fewer.
"""

from dataclasses import replace

from hybridlm.config import Attention, Block, GeGLU
from hybridlm.config_io import load_config

base = load_config("griffin_1b")
attention = Block(mixer=Attention(num_heads=16, num_kv_heads=1, head_dim=128), ffn=GeGLU(hidden=6912))

config = replace(base, model=replace(base.model, pattern=(attention,)))
