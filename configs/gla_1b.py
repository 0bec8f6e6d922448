"""Gated linear attention 1.3B: 4 heads with a decay per channel in every layer (Yang et al., 2023, arXiv:2312.06635).

    hybridlm train gla_1b --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/gla_1b

Published (section 5.1, and the shapes of the checkpoint gla-1.3B-100B): width, depth, 4 heads with keys of half the
width and values of all of it, gate of rank 16 and temperature 16, SwiGLU, untied embedding, vocabulary of 32,000,
sequences of 2048, AdamW with decay 0.01, clipping at 1, cosine from 3e-4 to 3e-5, warm-up over 1e9 of 100e9 tokens, two
million a step. Our choice: z-loss, rematerialisation and mesh.
"""

from hybridlm.config import (
    AdamW,
    Block,
    Checkpoint,
    Config,
    Cosine,
    Data,
    Eval,
    GatedLinearAttention,
    Mesh,
    Model,
    Sharding,
    SwiGLU,
    Train,
)

block = Block(
    mixer=GatedLinearAttention(num_heads=4, head_dim=256, value_head_dim=512),
    ffn=SwiGLU(hidden=5632),
)

config = Config(
    model=Model(
        vocab_size=32_000,
        width=2048,
        num_layers=24,
        pattern=(block,),
        tied_embedding=False,
        scale_embedding=False,
        remat="block_outputs",
    ),
    data=Data(source="text", path="corpus", seq_len=2048, tokenizer="tokenizer.json"),
    optimizer=AdamW(peak_lr=3e-4, weight_decay=0.01, schedule=Cosine(warmup_steps=500, final_fraction=0.1)),
    train=Train(steps=48_000, batch_size=1024, z_loss=1e-4),  # 100e9 tokens
    eval=Eval(every=1000, batches=20),
    checkpoint=Checkpoint(every=1000),
    sharding=Sharding(mesh=Mesh(data=1, fsdp=-1)),
)
