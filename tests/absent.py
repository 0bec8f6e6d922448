"""Devices that are not there."""

from typing import Any

import pytest

from hybridlm.plan.topology import prepare_process, topology


def absent_tpus(name: str) -> list[Any]:
    """Those of `name`, such as `v5e:2x2`, to compile for. Skips the test where libtpu is not installed."""
    pytest.importorskip("libtpu", reason="needs libtpu, which brings the TPU compiler: pip install 'hybridlm[tpu]'")
    where = topology(name)
    prepare_process(where)
    return where.devices()
