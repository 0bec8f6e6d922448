"""Parity of a stream of bits with one layer of DeltaNet, learned at 40 tokens and true at any length.

    hybridlm train parity --out runs/parity
    hybridlm eval runs/parity --length 40 80 160 320

A state that can flip its sign keeps track of parity; one with beta in (0, 1) cannot (Grazzi et al., 2024,
arXiv:2411.12537):

    hybridlm train parity --out runs/parity01 --model.pattern.0.mixer.allow-neg-eigval=false

`--data.source=NAME` trains on another task of `hybridlm list tasks`, with `--model.vocab-size` as large as its ids ask
for. The answer is asked for after every bit, where the paper asks at the end alone (`--data.task.answers=last`) and
takes 20,000 steps. `kernels/benchmarks/synthetic_tasks.py parity` compares mixers.
"""

from hybridlm.config import (
    AdamW,
    Block,
    Checkpoint,
    Config,
    Cosine,
    Data,
    DeltaNet,
    Eval,
    Model,
    Parity,
    SwiGLU,
    Train,
)

mixer = DeltaNet(num_heads=2, head_dim=16, conv_width=None, allow_neg_eigval=True)

config = Config(
    model=Model(vocab_size=8, width=32, num_layers=1, pattern=(Block(mixer=mixer, ffn=SwiGLU(hidden=64)),)),
    data=Data(source="parity", task=Parity(min_length=40), seq_len=40),
    optimizer=AdamW(peak_lr=1e-2, weight_decay=0.0, schedule=Cosine(warmup_steps=20)),
    train=Train(steps=150, batch_size=64, log_every=25),
    eval=Eval(every=150),
    checkpoint=Checkpoint(every=150),
)
