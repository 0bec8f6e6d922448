"""Memory+ at 1.3B: one table of 1,048,576 rows in place of three MLPs (Berges et al., 2024, arXiv:2412.09764).

    hybridlm train memory_plus_1b --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/memory_plus_1b

Published: layers 4, 12 and 20 of 24 read one table, 4 heads of 32 rows as wide as the model, queries of half that, the
rows' own constant rate of 1e-3 and clipping apart from the model's. Ours: the blocks, which are transformer_1b's, and
training. More rows are `--model.pattern.4.ffn.num_rows=16777216`.
Each device sorts all reads of a step, so batches are small: 131,072 tokens.
"""

from dataclasses import replace

from hybridlm.config import AdamW, MemoryPlus, Mesh, RowAdam, Sharding
from hybridlm.config_io import load_config

base = load_config("transformer_1b")
(block,) = base.model.pattern
memory = replace(block, ffn=MemoryPlus(num_rows=1024**2, table_dtype="bfloat16"))

config = replace(
    base,
    model=replace(base.model, num_layers=24, pattern=(*(block,) * 4, memory, *(block,) * 3)),
    optimizer=AdamW(peak_lr=1e-4, schedule=base.optimizer.schedule, tables=RowAdam(lr=1e-3, clip_norm=1.0)),
    train=replace(base.train, batch_size=64),
    sharding=Sharding(mesh=Mesh(data=1, fsdp=-1)),
)
