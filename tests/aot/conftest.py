"""Devices that are not there."""

from typing import Any

import jax
import pytest
from jax.experimental import topologies


@pytest.fixture(scope="session")
def sixteen_chips() -> Any:
    """Of a TPU v5e slice."""
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        pytest.skip(f"no TPU compiler: {error}")
