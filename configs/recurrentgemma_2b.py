"""RecurrentGemma 2B: the shapes of the published checkpoint (Botev et al., 2024, arXiv:2404.07839).

    hybridlm train recurrentgemma_2b --data.path=corpus/ --data.tokenizer=tokenizer.model --out runs/recurrentgemma_2b

Published in google-deepmind/recurrentgemma, RECURRENT_GEMMA_2B_V1: width and recurrence width 2560, 26 layers (the
pattern ends in its middle), 10 heads of 256, MLP 3 x 2560, window 2048, rotary positions on half of the head,
embedding scaled by sqrt(width) as bfloat16 rounds it, logits capped at 30, biases, a vocabulary of 256,000, sequences
of 8192; 2.68e9 parameters. Optimizer and tokens per batch are griffin_1b's.
"""

from dataclasses import replace

from hybridlm.config import RGLRU, Attention, Block, Data, GeGLU, Model
from hybridlm.config_io import load_config

base = load_config("griffin_1b")
ffn = GeGLU(hidden=3 * 2560, bias=True)
recurrent = Block(mixer=RGLRU(width=2560, num_heads=10, init="recurrentgemma", bias=True), ffn=ffn)
local_attention = Block(
    mixer=Attention(num_heads=10, num_kv_heads=1, head_dim=256, window=2048, rope_fraction=0.5, out_bias=True),
    ffn=ffn,
)

config = replace(
    base,
    model=Model(
        vocab_size=256_000,
        width=2560,
        num_layers=26,
        pattern=(recurrent, recurrent, local_attention),
        embedding_scale=50.5,
        logit_soft_cap=30.0,
        remat="block_outputs",
    ),
    data=Data(source="text", path="corpus", seq_len=8192, tokenizer="tokenizer.model"),
    train=replace(base.train, batch_size=128),
)
