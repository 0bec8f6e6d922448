"""Gated DeltaNet 1.3B: the gated delta rule in every layer (Yang et al., 2024, arXiv:2412.06464).

    hybridlm train gated_deltanet_1b --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/gated_deltanet_1b

From flash-linear-attention's default: width, depth, queries and keys of 1536 channels and values of 3072 together,
convolutions of 4, SwiGLU of 5632, a head of its own, a vocabulary of 32,000. From the authors' code
(NVlabs/GatedDeltaNet): sequences of 4096, 512 of them a step, 100e9 tokens, AdamW at 4e-4 with betas (0.9, 0.95), decay
0.1, clipping at 1 and a cosine down to a tenth. Our choice: heads of 128, the paper's best trade-off, two of values to
one of keys, where flash-linear-attention has 6 of 256 and 512; warm-up, z-loss and mesh.
"""

from hybridlm.config import (
    AdamW,
    Block,
    Checkpoint,
    Config,
    Cosine,
    Data,
    Eval,
    GatedDeltaNet,
    Mesh,
    Model,
    Sharding,
    SwiGLU,
    Train,
)

mixer = GatedDeltaNet(num_heads=12, num_value_heads=24, head_dim=128, value_head_dim=128)

config = Config(
    model=Model(
        vocab_size=32_000,
        width=2048,
        num_layers=21,
        pattern=(Block(mixer=mixer, ffn=SwiGLU(hidden=5632)),),
        tied_embedding=False,
        scale_embedding=False,
        remat="block_outputs",
    ),
    data=Data(source="text", path="corpus", seq_len=4096, tokenizer="tokenizer.json"),
    optimizer=AdamW(peak_lr=4e-4, schedule=Cosine(warmup_steps=500)),
    train=Train(steps=48_000, batch_size=512, z_loss=1e-4),  # 100e9 tokens
    eval=Eval(every=1000, batches=20),
    checkpoint=Checkpoint(every=1000),
    sharding=Sharding(mesh=Mesh(data=1, fsdp=-1)),
)
