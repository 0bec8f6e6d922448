"""Devices that are not there."""

from typing import Any

import pytest

from tests.absent import absent_tpus


@pytest.fixture(scope="session")
def sixteen_chips() -> Any:
    """Of a TPU v5e slice."""
    return absent_tpus("v5e:4x4")
