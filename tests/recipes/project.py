"""What pyproject.toml says, which the recipes have to repeat."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def requirements(key: str) -> list[tuple[str, str]]:
    """Name and lower bound of each line of ``dependencies`` (at run time) or ``requires`` (of the build)."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = ast.literal_eval(re.search(rf"^{key} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)[1])
    assert listed
    return [re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in listed]
