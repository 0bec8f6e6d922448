"""Mamba-2 1.3B: a state space mixer in every layer, no MLP (Dao and Gu, 2024, arXiv:2405.21060).

    hybridlm train mamba2_1b --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/mamba2_1b

Published (the authors' mamba2-1.3b): width, depth, heads of 64, state of 128, one group, convolution of 4, tied
embedding, vocabulary of the GPT-NeoX tokenizer (50,277, padded to 50,288), sequences of 2048, AdamW with betas (0.9,
0.95), decay 0.1, clipping at 1, cosine down to 1e-5 from 5 times GPT-3's rate for this size (Gu and Dao, 2023,
arXiv:2312.00752, appendix E.2), half a million tokens a step, 26e9 of them in the scaling experiments. Our choice:
warm-up, z-loss, rematerialisation and mesh.
"""

from hybridlm.config import (
    AdamW,
    Block,
    Checkpoint,
    Config,
    Cosine,
    Data,
    Eval,
    Mamba2,
    Mesh,
    Model,
    Sharding,
    Train,
)

config = Config(
    model=Model(
        vocab_size=50_288,
        width=2048,
        num_layers=48,
        pattern=(Block(mixer=Mamba2(num_heads=64), ffn=None),),
        scale_embedding=False,
        norm_eps=1e-5,
        remat="block_outputs",
    ),
    data=Data(source="text", path="corpus", seq_len=2048, tokenizer="tokenizer.json"),
    optimizer=AdamW(peak_lr=1e-3, schedule=Cosine(warmup_steps=1000, final_fraction=0.01)),
    train=Train(steps=50_000, batch_size=256, z_loss=1e-4),  # 26e9 tokens
    eval=Eval(every=1000, batches=20),
    checkpoint=Checkpoint(every=1000),
    sharding=Sharding(mesh=Mesh(data=1, fsdp=-1)),
)
