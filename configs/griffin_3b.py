"""Griffin 3B (De et al., 2024, arXiv:2402.19427): griffin_1b, wider.

    hybridlm train griffin_3b --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/griffin_3b

Published in table 2: width 3072, recurrence width 4096, depth 24, 24 heads, 60e9 tokens as the compute-optimal
amount. With a vocabulary of 32,000, which is our choice, as are the optimizer's numbers, it has 2.93e9 parameters.
"""

from dataclasses import replace

from hybridlm.config import RGLRU, AdamW, Attention, Block, Cosine, GeGLU
from hybridlm.config_io import load_config

base = load_config("griffin_1b")
ffn = GeGLU(hidden=3 * 3072)
recurrent = Block(mixer=RGLRU(width=4096, num_heads=16), ffn=ffn)
local_attention = Block(
    mixer=Attention(num_heads=24, num_kv_heads=1, head_dim=128, window=1024, rope_fraction=0.5),
    ffn=ffn,
)

config = replace(
    base,
    model=replace(base.model, width=3072, num_layers=24, pattern=(recurrent, recurrent, local_attention)),
    optimizer=AdamW(peak_lr=3e-4, schedule=Cosine(warmup_steps=1000)),
    train=replace(base.train, steps=57_000),  # 60e9 tokens
)
