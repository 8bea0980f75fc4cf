"""The GPU tests skip where the extension or the device is missing; CI has neither."""

from __future__ import annotations

import pytest

from batchinfer.ops.gpu import GpuOps, open_gpu


@pytest.fixture(scope="session")
def gpu() -> GpuOps:
    try:
        return open_gpu()
    except RuntimeError as e:
        pytest.skip(str(e))
