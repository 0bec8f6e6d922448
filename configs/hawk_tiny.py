"""Hawk: griffin_tiny with a recurrent block in every layer and no attention.

    hybridlm train hawk_tiny --out runs/hawk_tiny

The recurrence and the MLP are narrowed until the parameters equal griffin_tiny's.
"""

from dataclasses import replace

from hybridlm.config import RGLRU, Block, GeGLU
from hybridlm.config_io import load_config

base = load_config("griffin_tiny")
recurrent = Block(mixer=RGLRU(width=184, num_heads=4, init="recurrentgemma"), ffn=GeGLU(hidden=352))

config = replace(base, model=replace(base.model, pattern=(recurrent,)))
