"""The GPU tests skip where the extension or the device is missing; CI has neither."""

from __future__ import annotations

import pytest

from batchinfer.ops.gpu import GpuOps


@pytest.fixture(scope="session")
def gpu() -> GpuOps:
    try:
        return GpuOps()
    except RuntimeError as e:
        pytest.skip(str(e))
