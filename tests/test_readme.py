from __future__ import annotations

import pytest
import readme_tables

from batchinfer import config


@pytest.mark.parametrize("name", readme_tables.TABLES)
def test_a_table_is_what_it_is_made_of(name: str) -> None:
    assert readme_tables.in_readme(name) == readme_tables.TABLES[name](), "run `make readme`"


def test_every_configuration_key_is_explained() -> None:
    table = readme_tables.configuration()
    for key, _ in config.items():
        line = next((line for line in table.splitlines() if line.startswith(f"| `{key}` |")), "")
        assert len(line.split("|")[3].strip()) > 10, f"{key} has no comment in configs/"


def test_every_module_says_what_it_does() -> None:
    table = readme_tables.tree()
    for path in readme_tables.PACKAGE.rglob("*.py"):
        if path.name != "__init__.py" and "configs" not in path.parts:
            assert f"| `{path.relative_to(readme_tables.PACKAGE).as_posix()}` |" in table, f"{path} has no docstring"
