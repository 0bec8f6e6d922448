"""Multi-query associative recall with two layers: RG-LRU, then attention.

    hybridlm train mqar --out runs/mqar
    hybridlm eval runs/mqar

After the smallest setting of Zoology (Arora et al., 2023, arXiv:2312.04927): 4 pairs, width 64, two layers, no MLP. For
minutes on a CPU there are 32 tokens instead of 64, and 128 ids instead of 8,192. Its others are

    --data.seq-len=64 --data.task.vocab-size=8192 --model.vocab-size=8192
    --data.seq-len=128 --data.task.num-pairs=8
    --data.seq-len=256 --data.task.num-pairs=16
    --data.seq-len=512 --data.task.num-pairs=64 --data.task.vocab-size=8192 --model.vocab-size=8192

and `--data.source=NAME` trains on another task of `hybridlm list tasks`. `kernels/benchmarks/synthetic_tasks.py mqar`
compares mixers.
"""

from hybridlm.config import (
    MQAR,
    RGLRU,
    AdamW,
    Attention,
    Block,
    Checkpoint,
    Config,
    Cosine,
    Data,
    Eval,
    Model,
    Train,
)

recurrent = Block(mixer=RGLRU(width=64, num_heads=4), ffn=None)
attention = Block(mixer=Attention(num_heads=2, num_kv_heads=2, head_dim=64), ffn=None)

config = Config(
    model=Model(vocab_size=128, width=64, num_layers=2, pattern=(recurrent, attention)),
    data=Data(source="mqar", task=MQAR(num_pairs=4, vocab_size=128, num_examples=20_000), seq_len=32),
    optimizer=AdamW(peak_lr=3e-3, schedule=Cosine(warmup_steps=40)),
    train=Train(steps=600, batch_size=256, log_every=25),
    eval=Eval(every=100),
    checkpoint=Checkpoint(every=600),
)
