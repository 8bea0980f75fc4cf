"""A process whose library calls exit(), or wants the launcher to end everybody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from batchinfer.cluster.outlive import WITHOUT_MPI, lifeline

PROGRAM = """
import ctypes, os, sys
from batchinfer.cluster.outlive import WITHOUT_MPI, lifeline
if WITHOUT_MPI in sys.argv:
    print("again", os.getpid(), *sys.argv[1:])
    sys.exit(3)
print("first", os.getpid(), flush=True)
line = lifeline(os.environ)
os.write(int(os.environ["PMI_FD"]), b"from the library\\n")
{end}
"""
ENDS = {
    "the library's exit": ("ctypes.CDLL(None).exit(15)", 3, b""),
    "the library's exit in another thread": (
        "import threading; t = threading.Thread(target=ctypes.CDLL(None).exit, args=(15,)); t.start(); t.join()",
        3,
        b"",
    ),
    "a call that does not come back": (
        "import time; from batchinfer.cluster import outlive; outlive.STUCK_SECONDS = 1.0; time.sleep(1)\n"
        "with line.call(): time.sleep(0.1)\n"
        "time.sleep(2); sys.stderr.write('lived on')\n"
        "with line.call(): time.sleep(60)",
        3,
        b"",
    ),
    "our own exit": ("sys.exit(7)", 7, b""),
    "an exception": ("raise SystemExit(9)", 9, b""),
    "after it was given back": (
        "line.give_back(); os.write(int(os.environ['PMI_FD']), b'abort'); ctypes.CDLL(None).exit(15)",
        15,
        b"abort",
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_who_may_end_the_process(end: str, tmp_path: Path) -> None:
    code, expected, heard = ENDS[end]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(end=code))
    launcher, channel = socket.socketpair()
    environment = os.environ | {"SLURM_STEP_ID": "0", "PMI_FD": str(channel.fileno())}
    command = [sys.executable, str(program), "run", "a=b"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with launcher, subprocess.Popen(command, env=environment, pass_fds=[channel.fileno()], **pipes) as process:
        channel.close()
        output, errors = process.communicate(timeout=60)
        said = launcher.recv(100)
    assert process.returncode == expected, errors
    lines = [f"first {process.pid}"] + ([f"again {process.pid} run a=b {WITHOUT_MPI}"] if expected == 3 else [])
    assert output.splitlines() == lines
    assert ("lived on" in errors) == ("lived on" in code)
    assert said == heard


def test_only_where_srun_lets_survivors_live() -> None:
    assert lifeline({}) is None
    assert lifeline({"PMI_FD": "5"}) is None  # mpiexec
    assert lifeline({"SLURM_STEP_ID": "0", "PMIX_RANK": "1"}) is None  # another library, another line
