"""One run to a directory: a lock that ends with the process that holds it, however that ends.

On one machine `flock` decides. Between machines the holder rewrites the file every few seconds, and a lock that stands
still for longer than that was left behind.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from hybridlm.config_check import ConfigError

BEAT_SECONDS = 5.0
WATCH_SECONDS = 30.0
"""For how long a lock of another host is watched: a few beats, of a slow file system."""


class DirectoryLock:
    """Holds `directory` for this process while it is entered. Raises ConfigError where another run holds it."""

    def __init__(self, directory: Path, *, watch_seconds: float = WATCH_SECONDS):
        self.path = directory / "run.lock"
        self._watch_seconds = watch_seconds
        self._file = -1
        self._left = threading.Event()
        self._holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%FT%T%z")}

    def __enter__(self) -> "DirectoryLock":
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._acquire()
        except BaseException:
            os.close(self._file)
            raise
        self._beat(0)
        self._thread = threading.Thread(target=self._beat_on, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        self._thread.join()
        # Empty, it is free. Were it removed, who has it open already would hold what nobody else finds.
        os.ftruncate(self._file, 0)
        os.close(self._file)

    def _acquire(self) -> None:
        locked = self._flock()
        before = self._read()
        here = before.get("host") == self._holder["host"]
        if locked is False and (here or not before):
            self._refuse()
        if locked is not False and (not before or (here and (locked or not _is_alive(before.get("pid"))))):
            return
        # Of another host, whose death a file system may learn of late or never.
        deadline = time.monotonic() + self._watch_seconds
        while time.monotonic() < deadline:
            time.sleep(min(0.2, self._watch_seconds))
            if self._read() != before:
                self._refuse()

    def _flock(self) -> bool | None:
        """Whether the lock was free; None where the file system has none."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL):
                raise
            return None
        return True

    def _refuse(self) -> NoReturn:
        holder = self._read()
        who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('started')}"
        raise ConfigError(
            str(self.path.parent), f": another run is going on there ({who}); choose another --out, or stop that run"
        )

    def _read(self) -> dict[str, Any]:
        """What the file says; nothing where it is empty or half written."""
        try:
            return json.loads(self.path.read_text() or "{}")
        except (ValueError, FileNotFoundError):
            return {}

    def _beat(self, count: int) -> None:
        content = json.dumps(self._holder | {"beat": count}).encode() + b"\n"
        os.pwrite(self._file, content.ljust(256), 0)

    def _beat_on(self) -> None:
        count = 0
        while not self._left.wait(BEAT_SECONDS):
            count += 1
            try:
                self._beat(count)
            except OSError:
                # A full disk stops the run where it matters; flock still holds the directory.
                continue


def _is_alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True
