"""Kernel tests take the fixture ``gpu``, a GPU or the emulator; what only a GPU can show takes ``real_gpu``, and
what the emulator is too slow for ``quick_gpu``."""

from __future__ import annotations

import zlib

import pytest
from gpu.backend import EMULATOR, SIMT, draw_schedule, open_ops

from batchinfer.ops.device import DeviceOps


@pytest.fixture(scope="session")
def ops() -> DeviceOps:
    try:
        return open_ops()
    except RuntimeError as e:
        pytest.skip(str(e))


@pytest.fixture
def gpu(ops: DeviceOps, request: pytest.FixtureRequest) -> DeviceOps:
    draw_schedule(zlib.crc32(request.node.name.encode()))
    return ops


@pytest.fixture
def real_gpu(ops: DeviceOps) -> DeviceOps:
    if EMULATOR:
        pytest.skip("needs a GPU, not the emulator")
    return ops


@pytest.fixture
def quick_gpu(ops: DeviceOps) -> DeviceOps:
    if SIMT:
        pytest.skip("takes hours on the emulator")
    return ops
