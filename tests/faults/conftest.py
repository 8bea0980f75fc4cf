"""A fork server for all tests of this folder, and the table of what was tried."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import shim
from faults.harness import Bench, Server, serving
from faults.oracle import Expected, expect, write_inputs
from faults.sizes import LONG, SEED, tally

MEMORY = "/dev/shm"


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or shim.compiler() is None:
        pytest.skip("faults at system calls need Linux and a C compiler")
    return shim.build(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def server(shim_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), shim_library) as running:
        yield running


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files with 60 rows, three of which can't be answered; nine chunks of up to ten rows."""
    return write_inputs(tmp_path_factory.mktemp("faults") / "in")


@pytest.fixture(scope="session")
def expected(inputs: Path) -> Expected:
    return expect(inputs)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of fsyncs to a disk take minutes, and a killed process does not
    show whether they were real (test_order.py looks at that)."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="batchinfer-faults-") as folder:
        yield Path(folder)


@pytest.fixture
def bench(server: Server, inputs: Path, scratch: Path) -> Bench:
    return Bench(server, scratch, inputs)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not tally:
        return
    terminalreporter.section(f"faults, {'long' if LONG else 'quick'} sizes, seed {SEED}")
    terminalreporter.write_line("| tried | times |\n|---|---|")
    for kind, number in sorted(tally.items()):
        terminalreporter.write_line(f"| {kind} | {number:,} |")
