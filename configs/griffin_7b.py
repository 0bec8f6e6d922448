"""Griffin 7B (De et al., 2024, arXiv:2402.19427): griffin_1b, wider and deeper.

    hybridlm train griffin_7b --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/griffin_7b

Published in table 2: width 4096, recurrence width 5632, depth 32, 32 heads, 132.5e9 tokens as the compute-optimal
amount. With a vocabulary of 32,000, which is our choice, as are the optimizer's numbers, it has 6.92e9 parameters.
The authors' code has 32 gate blocks here; the paper says 16 for all its experiments, and so do we.
"""

from dataclasses import replace

from hybridlm.config import RGLRU, AdamW, Attention, Block, Cosine, GeGLU
from hybridlm.config_io import load_config

base = load_config("griffin_1b")
ffn = GeGLU(hidden=3 * 4096)
recurrent = Block(mixer=RGLRU(width=5632, num_heads=16), ffn=ffn)
local_attention = Block(
    mixer=Attention(num_heads=32, num_kv_heads=1, head_dim=128, window=1024, rope_fraction=0.5),
    ffn=ffn,
)

config = replace(
    base,
    model=replace(base.model, width=4096, num_layers=32, pattern=(recurrent, recurrent, local_attention)),
    optimizer=AdamW(peak_lr=2e-4, schedule=Cosine(warmup_steps=1000)),
    train=replace(base.train, steps=126_000),  # 132.5e9 tokens
)
