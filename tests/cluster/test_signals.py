"""Signals, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

WAIT = """
import sys, time
from batchinfer.cluster.signals import install, received
install()
print("ready", flush=True)
for _ in range(3000):
    if received() and sys.argv[1:] != ["stay"]:
        break
    time.sleep(0.01)
print(received(), flush=True)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WAIT, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM"])
def test_a_signal_is_noted_and_ends_nothing(name: str) -> None:
    with start() as process:
        process.send_signal(getattr(signal, name))
        assert process.communicate(timeout=60) == (f"{name}\n", None)
        assert process.returncode == 0


def test_a_second_term_ends_the_process_at_once() -> None:
    with start("stay") as process:
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):  # the first one does not, whatever came before
            process.wait(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75


def test_a_signal_blocked_by_the_launcher_is_heard() -> None:
    """Blocked signals stay pending over exec: nothing is lost while the interpreter starts."""
    code = f"""
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.kill(os.getpid(), signal.SIGUSR1)
os.execv({sys.executable!r}, [{sys.executable!r}, "-c", {WAIT!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ready\nSIGUSR1\n"
