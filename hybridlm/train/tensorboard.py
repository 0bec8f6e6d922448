"""TensorBoard events, written when they are told: an error of the disk is raised, and nothing waits for a thread."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def _absent(name: str) -> Iterator[None]:
    """A module that is not imported yet cannot be."""
    if name in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]


# tensorboardX imports PyTorch where it is installed, which takes longer than all our imports, to annotate a type by it.
with _absent("torch"):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2
    from tensorboardX.summary import scalar

PROTO: Any = event_pb2  # whose names are made when it is imported

FLUSH_SECONDS = 30.0


class TensorBoard:
    """Scalars of a run from `first_step` on; what older files hold of later steps is discarded by TensorBoard."""

    def __init__(self, directory: Path, first_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        # The step tells apart two files that are begun within one second.
        self._writer = EventsWriter(str(directory / "events"), f".{first_step}")
        begin = PROTO.SessionLog(status=PROTO.SessionLog.SessionStatus.Value("START"))
        self._writer.write_event(PROTO.Event(wall_time=time.time(), step=first_step + 1, session_log=begin))
        self._flushed = time.monotonic()

    def add(self, name: str, value: int | float, step: int) -> None:
        self._writer.write_event(PROTO.Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()
