"""A module that `hybridlm train --import tests.faults.witness` loads: writes down every batch that is handed out.

One line of `handed.jsonl`, in the directory that the process works in, for each: which process, the number of the batch
before it, its own, and a digest of each row of tokens that the process' devices hold.
"""

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np

from hybridlm.data.arrays import Batch
from hybridlm.data.pipeline import Batches

HANDED = Path("handed.jsonl")
_next = Batches.__next__


def _witnessed(self: Batches) -> Batch:
    after = self.position
    batch = _next(self)
    rows = {}
    for shard in batch["tokens"].addressable_shards:
        first = shard.index[0].start or 0
        for i, row in enumerate(np.asarray(shard.data)):
            rows[first + i] = hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest()
    line = {"process": jax.process_index(), "after": after, "batch": self.position, "rows": rows}
    # One write to a file that is only appended to: whole, whenever the process is killed.
    file = os.open(HANDED, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, json.dumps(line).encode() + b"\n")
    os.close(file)
    return batch


Batches.__next__ = _witnessed
