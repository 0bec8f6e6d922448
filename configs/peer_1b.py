"""PEER at 1.3B: a million experts of one neuron in place of the middle MLP (He, 2024, arXiv:2407.04153).

    hybridlm train peer_1b --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/peer_1b

Published: 1,048,576 experts, 8 heads of 16, batch norm of queries. Ours: the blocks, which are transformer_1b's, the
place (layer 12 of 24), and training; rows are trained by row-wise Adagrad, which keeps 4 bytes for each.
Each device sorts all reads of a step, so batches are small: 131,072 tokens.
"""

from dataclasses import replace

from hybridlm.config import PEER, AdamW, Mesh, RowAdagrad, Sharding
from hybridlm.config_io import load_config

base = load_config("transformer_1b")
(block,) = base.model.pattern
experts = replace(block, ffn=PEER(num_rows=1024**2, table_dtype="bfloat16"))

config = replace(
    base,
    model=replace(base.model, num_layers=24, prologue=(*(block,) * 12, experts), pattern=(block,)),
    optimizer=AdamW(peak_lr=3e-4, schedule=base.optimizer.schedule, tables=RowAdagrad(lr=1e-2)),
    train=replace(base.train, batch_size=64),
    sharding=Sharding(mesh=Mesh(data=1, fsdp=-1)),
)
