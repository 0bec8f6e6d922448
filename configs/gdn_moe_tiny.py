"""Three layers of Gated DeltaNet to one of attention, with sixteen small experts and a shared one, on a CPU.

    hybridlm train gdn_moe_tiny --out runs/gdn_moe_tiny

qwen3_next_style_tiny with Qwen3-Next's kind of FFN: softmax over all experts, weights of the chosen ones renormalised,
a shared expert behind a sigmoid gate. Four experts and the shared one cost a token what the MLP costs there.
"""

from dataclasses import replace

from hybridlm.config import Block, MoE, TopK
from hybridlm.config_io import load_config

base = load_config("qwen3_next_style_tiny")
experts = MoE(
    num_experts=16,
    hidden=64,
    router=TopK(k=4, balance_loss=0.01, z_loss=0.001),
    shared_hidden=64,
    shared_gate=True,
)

config = replace(
    base,
    model=replace(base.model, pattern=tuple(Block(mixer=block.mixer, ffn=experts) for block in base.model.pattern)),
)
