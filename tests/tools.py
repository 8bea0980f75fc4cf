"""Programs that tests of a build start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys


def tool(name: str) -> str:
    """Where a program is: beside the interpreter, or in PATH."""
    found = shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    assert found, f"{name} is not installed"
    return found


def run(*command: str, **environment: str) -> str:
    """What a command prints, which must succeed."""
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
