"""GLaM's 1.7B/64E: experts in every other layer, 64 of them, two per token (Du et al., 2021, arXiv:2112.06905).

    hybridlm train glam_style --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/glam_style

Published (table 4): width 2048, 24 layers, 16 heads of 128, FFNs of 8192, GShard's top-2 routing and balance loss. The
paper's experts have two matrices; ours are gated and so two thirds as wide, as are the dense layers' MLPs. Ours:
rotary positions for its relative bias, the vocabulary, no dropped tokens but those that overflow a buffer, training.
"""

from hybridlm.config import (
    AdamW,
    Attention,
    Block,
    Checkpoint,
    Config,
    Cosine,
    Data,
    Dropless,
    Eval,
    GeGLU,
    GShardTop2,
    Mesh,
    Model,
    MoE,
    Sharding,
    Train,
)

attention = Attention(num_heads=16, num_kv_heads=16, head_dim=128)
experts = MoE(
    num_experts=64,
    hidden=5504,
    router=GShardTop2(),
    dispatch=Dropless(buffer_factor=1.25),
    activation="GeGLU",
)

config = Config(
    model=Model(
        vocab_size=256_000,
        width=2048,
        num_layers=24,
        pattern=(Block(mixer=attention, ffn=GeGLU(hidden=5504)), Block(mixer=attention, ffn=experts)),
        remat="block_outputs",
    ),
    data=Data(source="text", path="corpus", seq_len=1024, tokenizer="tokenizer.json"),
    optimizer=AdamW(peak_lr=3e-4, schedule=Cosine(warmup_steps=2000)),
    train=Train(steps=280_000, batch_size=1024, z_loss=1e-4),  # 300e9 tokens
    eval=Eval(every=2000, batches=20),
    checkpoint=Checkpoint(every=1000),
    sharding=Sharding(mesh=Mesh(data=1, fsdp=-1, expert=16)),
)
