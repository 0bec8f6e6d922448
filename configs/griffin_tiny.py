"""Griffin with 1.4 million parameters on Python source: the quickstart, minutes on a laptop.

    hybridlm train griffin_tiny --out runs/griffin_tiny

Bytes of the running Python's standard library; nothing is downloaded.
"""

from hybridlm.config import RGLRU, AdamW, Attention, Block, Config, Cosine, Data, Eval, GeGLU, Model, Train

ffn = GeGLU(hidden=384)
recurrent = Block(mixer=RGLRU(width=192, num_heads=4, init="recurrentgemma"), ffn=ffn)
local_attention = Block(
    mixer=Attention(num_heads=4, num_kv_heads=1, head_dim=32, window=128, rope_fraction=0.5),
    ffn=ffn,
)

config = Config(
    model=Model(
        vocab_size=320,
        width=128,
        num_layers=6,
        pattern=(recurrent, recurrent, local_attention),
        remat="block_outputs",  # on a CPU recomputing is cheaper than writing activations down and reading them back
    ),
    data=Data(source="python-stdlib", seq_len=256),
    optimizer=AdamW(peak_lr=3e-3, schedule=Cosine(warmup_steps=50)),
    train=Train(steps=1800, batch_size=8, log_every=25),
    eval=Eval(every=600, batches=25),
)
