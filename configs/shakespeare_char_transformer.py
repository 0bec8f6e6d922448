"""shakespeare_char with full attention in every layer, as many parameters.

    hybridlm train shakespeare_char_transformer --data.path=tinyshakespeare.txt --out runs/shakespeare_char_transformer

Everything else is shakespeare_char's.
"""

from dataclasses import replace

from hybridlm.config import Attention, Block
from hybridlm.config_io import load_config

base = load_config("shakespeare_char")
block = Block(mixer=Attention(num_heads=4, num_kv_heads=4), ffn=base.model.pattern[0].ffn)

config = replace(base, model=replace(base.model, pattern=(block,)))
