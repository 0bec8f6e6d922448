"""griffin_tiny with a memory of 16,384 rows in place of every third MLP: fewer FLOPs, two and a half times the size.

    hybridlm train griffin_memory_tiny --out runs/griffin_memory_tiny

The second layer of each repeat reads 4 heads x 8 rows of one table, which both repeats share (Memory+). Rows are
trained by Adam, only those that a step reads, at a constant rate of their own; the rest is griffin_tiny's.
"""

from dataclasses import replace

from hybridlm.config import AdamW, Block, MemoryPlus, RowAdam
from hybridlm.config_io import load_config

base = load_config("griffin_tiny")
recurrent, _, local_attention = base.model.pattern
memory = Block(mixer=recurrent.mixer, ffn=MemoryPlus(num_rows=128**2, top_k=8, qk_norm=True))

config = replace(
    base,
    model=replace(base.model, pattern=(recurrent, memory, local_attention)),
    optimizer=AdamW(peak_lr=3e-3, schedule=base.optimizer.schedule, tables=RowAdam(lr=3e-3)),
)
