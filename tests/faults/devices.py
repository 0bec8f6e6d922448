"""Devices of the runs that a test makes in its own process."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import pytest

from hybridlm.sharding import make_mesh
from hybridlm.train import loop


@contextmanager
def on_two_devices() -> Iterator[None]:
    """Runs have two of the eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_mesh", lambda config: make_mesh(config.sharding.mesh, jax.devices()[:2]))
        yield
