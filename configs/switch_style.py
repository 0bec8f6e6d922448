"""Switch-Base as a decoder: one of 128 experts in every other layer (Fedus et al., 2021, arXiv:2101.03961).

    hybridlm train switch_style --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/switch_style

Published (table 9): width 768, 12 layers, 12 heads of 64, gated FFNs of 2048, 128 experts, jitter and balance loss of
0.01, capacity 1.25, sequences of 512. The paper has an encoder of as many layers besides. Ours: rotary positions, the
vocabulary's size, one-hot dispatch in groups of a sequence, training.
"""

from hybridlm.config import (
    AdamW,
    Attention,
    Block,
    Capacity,
    Checkpoint,
    Config,
    Cosine,
    Data,
    Eval,
    GeGLU,
    Mesh,
    Model,
    MoE,
    Sharding,
    Switch,
    Train,
)

attention = Attention(num_heads=12, num_kv_heads=12, head_dim=64)
experts = MoE(
    num_experts=128,
    hidden=2048,
    router=Switch(),
    dispatch=Capacity(factor=1.25),
    activation="GeGLU",
)

config = Config(
    model=Model(
        vocab_size=32_128,
        width=768,
        num_layers=12,
        pattern=(Block(mixer=attention, ffn=GeGLU(hidden=2048)), Block(mixer=attention, ffn=experts)),
        remat="block_outputs",
    ),
    data=Data(source="text", path="corpus", seq_len=512, tokenizer="tokenizer.json"),
    optimizer=AdamW(peak_lr=1e-3, schedule=Cosine(warmup_steps=2000)),
    train=Train(steps=550_000, batch_size=2048, z_loss=1e-4),
    eval=Eval(every=2000, batches=20),
    checkpoint=Checkpoint(every=1000),
    sharding=Sharding(mesh=Mesh(data=-1, expert=8)),
)
