"""UltraMem beside a 1.5B transformer: six tables, each read four blocks before its answer is added.

    hybridlm train ultramem_1b --data.path=corpus/ --data.tokenizer=tokenizer.json --out runs/ultramem_1b

Published (Huang et al., 2025, arXiv:2411.12364): reads after layers 3, 8, ..., 28, additions after 7, 12, ..., 32, 2
heads, 2 cores, rank 2, 4 virtual tables, rows half as wide as the model, their rate from 10 times the model's to 1.
Ours: 1,048,576 rows per table (6.4 B parameters in tables), 42 rows per head, the blocks' shapes, and training.
Each device sorts all reads of a step, so batches are small: 32,768 tokens.
"""

from dataclasses import replace

from hybridlm.config import AdamW, AddHeld, Attention, Beside, Block, Mesh, RowAdagrad, Sharding, SwiGLU, UltraMem
from hybridlm.config_io import load_config

base = load_config("transformer_1b")
attention, mlp = Attention(num_heads=16, num_kv_heads=4, head_dim=128), SwiGLU(hidden=5504)
memory = UltraMem(num_rows=1024**2, table_dtype="bfloat16")
block = Block(mixer=attention, ffn=mlp)
reads = Block(mixer=attention, ffn=Beside(ffn=mlp, memory=memory, held=True))
adds = Block(mixer=attention, ffn=AddHeld(ffn=mlp))

config = replace(
    base,
    model=replace(base.model, num_layers=32, prologue=(block, block), pattern=(reads, block, block, block, adds)),
    optimizer=AdamW(
        peak_lr=3e-4,
        schedule=base.optimizer.schedule,
        tables=RowAdagrad(multiplier=10.0, final_multiplier=1.0),
    ),
    train=replace(base.train, batch_size=16),
    sharding=Sharding(mesh=Mesh(data=1, fsdp=-1)),
)
