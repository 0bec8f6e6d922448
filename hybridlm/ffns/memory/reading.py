"""What memory layers know of the tables that they read."""

from hybridlm import config
from hybridlm.ffns.base import Pass
from hybridlm.ffns.memory.table import Table, layers_of, num_tables
from hybridlm.mixers.base import Context


def table_of(given: Pass, name: str) -> Table:
    assert given.shared is not None, "memory layers read tables, which LM.shared holds"
    return given.shared[name]


def idle_share(cfg: config.Memory, context: Context, used_rows: int, width: int) -> int:
    """Numbers in the tables that one token does not read, in equal parts by layer; it reads `used_rows` in each."""
    layers = len(layers_of(cfg, context))
    return (num_tables(cfg, context) * cfg.num_rows // layers - used_rows) * width
