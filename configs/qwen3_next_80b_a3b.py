"""Qwen3-Next-80B-A3B's shapes: three layers of Gated DeltaNet to one of gated attention, 512 experts, 10 per token.

    hybridlm train qwen3_next_80b_a3b --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/qwen3_next_80b_a3b

Published (Qwen/Qwen3-Next-80B-A3B-Instruct, config.json): width, depth, heads, rotary share and base, convolution,
experts of 512 and a shared one behind a sigmoid gate, softmax scores renormalised over the chosen, weight 0.001 of the
balance loss, vocabulary. Without its multi-token prediction. Ours: everything about training, and the mesh.
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
    GatedDeltaNet,
    Mesh,
    Model,
    MoE,
    Sharding,
    TopK,
    Train,
)

experts = MoE(
    num_experts=512,
    hidden=512,
    router=TopK(k=10, balance_loss=0.001, z_loss=0.0),
    dispatch=Dropless(buffer_factor=1.25),
    shared_hidden=512,
    shared_gate=True,
)
delta = Block(mixer=GatedDeltaNet(num_heads=16, num_value_heads=32, head_dim=128, value_head_dim=128), ffn=experts)
attention = Block(
    mixer=Attention(
        num_heads=16,
        num_kv_heads=2,
        head_dim=256,
        rope_fraction=0.25,
        rope_theta=10_000_000.0,
        qk_norm=True,
        out_gate=True,
    ),
    ffn=experts,
)

config = Config(
    model=Model(
        vocab_size=151_936,
        width=2048,
        num_layers=48,
        pattern=(delta, delta, delta, attention),
        tied_embedding=False,
        scale_embedding=False,
        remat="full",
    ),
    data=Data(source="text", path="corpus", seq_len=4096, tokenizer="tokenizer.json"),
    optimizer=AdamW(peak_lr=3e-4, schedule=Cosine(warmup_steps=2000)),
    train=Train(steps=240_000, batch_size=1024, z_loss=1e-4),  # 1e12 tokens
    eval=Eval(every=2000, batches=20),
    checkpoint=Checkpoint(every=1000),
    sharding=Sharding(mesh=Mesh(data=1, fsdp=-1, expert=16)),
)
