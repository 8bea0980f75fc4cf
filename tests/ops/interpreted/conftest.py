"""Tests of the Triton kernels in Triton's interpreter, on the CPU; ../test_triton.py runs them in a process of their
own, because Triton looks at the variable when a kernel is defined."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def ops():
    from batchinfer.ops.triton.backend import TritonOps

    return TritonOps("cpu")
