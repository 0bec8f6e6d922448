"""Channel mixers, one file each. A new one is one file and one line here, or one `register` call of your own."""

from hybridlm import config
from hybridlm.ffns.base import FFNS as FFNS
from hybridlm.ffns.beside import AddHeld, Beside
from hybridlm.ffns.gated_mlp import ACTIVATIONS, GatedMLP
from hybridlm.ffns.memory.peer import PEER
from hybridlm.ffns.memory.product_key_memory import MemoryPlus, ProductKeyMemory
from hybridlm.ffns.memory.ultramem import UltraMem
from hybridlm.ffns.moe.layer import MoE

register = FFNS.register

for gated in ACTIVATIONS:
    register(gated, GatedMLP, examples=(gated(hidden=48), gated(hidden=40, bias=True)))
register(
    config.MoE,
    MoE,
    examples=(
        config.MoE(num_experts=8, hidden=24),
        config.MoE(
            num_experts=4,
            hidden=16,
            router=config.TopK(k=3, score="sigmoid", bias_balance=True, scale=2.5),
            dispatch=config.Dropless(exchange="padded", buffer_factor=None),
            activation="GeGLU",
            shared_hidden=24,
            shared_gate=True,
        ),
        config.MoE(num_experts=8, hidden=16, router=config.Switch(), dispatch=config.Capacity(factor=2.0)),
    ),
)
memory = config.ProductKeyMemory(num_rows=64, top_k=4, num_heads=2, key_dim=16)
register(config.ProductKeyMemory, ProductKeyMemory, examples=(memory,))
register(config.MemoryPlus, MemoryPlus, examples=(config.MemoryPlus(num_rows=64, top_k=8, num_heads=3, qk_norm=True),))
register(config.PEER, PEER, examples=(config.PEER(num_rows=64, top_k=3, num_heads=2, key_dim=16),))
register(config.UltraMem, UltraMem, examples=(config.UltraMem(num_rows=64, top_k=4, key_dim=16),))
register(config.Beside, Beside, examples=(config.Beside(ffn=config.SwiGLU(hidden=48), memory=memory),))
register(config.AddHeld, AddHeld, examples=(config.AddHeld(ffn=config.SwiGLU(hidden=48)),))
