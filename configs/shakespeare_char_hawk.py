"""shakespeare_char with a recurrent block in every layer, as many parameters.

    hybridlm train shakespeare_char_hawk --data.path=tinyshakespeare.txt --out runs/shakespeare_char_hawk

Everything else is shakespeare_char's.
"""

from dataclasses import replace

from hybridlm.config import RGLRU, Block
from hybridlm.config_io import load_config

base = load_config("shakespeare_char")
block = Block(mixer=RGLRU(width=152, num_heads=8, init="recurrentgemma"), ffn=base.model.pattern[0].ffn)

config = replace(base, model=replace(base.model, pattern=(block,)))
