"""Griffin 1.3B: two recurrent blocks, then one of local attention (De et al., 2024, arXiv:2402.19427).

    hybridlm train griffin_1b --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/griffin_1b

Published (sections 2, 3 and 4.1, table 2): width, recurrence width, depth, MLP expansion 3, MQA with heads of 128,
window 1024, 16 gate blocks, tied embedding, sequences of 2048, AdamW, 25e9 tokens as the compute-optimal amount.
From the authors' code (google-deepmind/recurrentgemma): rotary positions on half of the head, an embedding that is
not scaled. Our choice, because the paper is silent: a vocabulary of 32,000, which makes 1.31e9 parameters, the
optimizer's numbers, batch, schedule and mesh.
"""

from hybridlm.config import (
    RGLRU,
    AdamW,
    Attention,
    Block,
    Checkpoint,
    Config,
    Cosine,
    Data,
    Eval,
    GeGLU,
    Mesh,
    Model,
    Sharding,
    Train,
)

ffn = GeGLU(hidden=3 * 2048)
recurrent = Block(mixer=RGLRU(width=2560, num_heads=16), ffn=ffn)
local_attention = Block(
    mixer=Attention(num_heads=16, num_kv_heads=1, head_dim=128, window=1024, rope_fraction=0.5),
    ffn=ffn,
)

config = Config(
    model=Model(
        vocab_size=32_000,
        width=2048,
        num_layers=24,
        pattern=(recurrent, recurrent, local_attention),
        scale_embedding=False,
        remat="block_outputs",
    ),
    data=Data(source="text", path="corpus", seq_len=2048, tokenizer="tokenizer.json"),
    optimizer=AdamW(peak_lr=4e-4, schedule=Cosine(warmup_steps=1000)),
    train=Train(steps=24_000, batch_size=512, z_loss=1e-4),  # 25e9 tokens
    eval=Eval(every=1000, batches=20),
    checkpoint=Checkpoint(every=1000),
    sharding=Sharding(mesh=Mesh(data=1, fsdp=-1)),
)
