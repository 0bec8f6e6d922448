"""Llama 2 7B's shape in our blocks, to lay beside MaxText's: `maxtext_plan.py` has the commands.

    hybridlm plan kernels/benchmarks/llama2_7b.py --topology v5p:4x4x4

Touvron et al., 2023 (arXiv:2307.09288): width 4096, 32 layers of 32 heads of 128, SwiGLU of 11,008, an untied head.
Batch, length, optimizer and mesh are griffin_7b's.
"""

from dataclasses import replace

from hybridlm.config import Attention, Block, SwiGLU
from hybridlm.config_io import load_config

base = load_config("griffin_7b")
block = Block(mixer=Attention(num_heads=32, num_kv_heads=32, head_dim=128), ffn=SwiGLU(hidden=11_008))

config = replace(
    base,
    model=replace(
        base.model,
        width=4096,
        num_layers=32,
        pattern=(block,),
        vocab_size=32_000,
        tied_embedding=False,
        norm_eps=1e-5,
        remat="full",
    ),
    train=replace(base.train, z_loss=0.0),
)
