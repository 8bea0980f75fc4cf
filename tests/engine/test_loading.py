"""An installation without the compiled engine says so, and what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT = """
import sys
sys.modules["batchinfer._engine"] = None
from batchinfer.types import JobError
try:
    import batchinfer.engine.loading
except JobError as error:
    print(error.exit_code, error)
"""


@pytest.mark.feature("commands", "a build for login nodes (BATCHINFER_DEVICE=none) plans, verifies and reports")
def test_without_the_extension_the_rebuild_command_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("69 this installation has no compiled engine"), done.stderr
    assert "BATCHINFER_DEVICE=cpu pip install" in done.stdout
