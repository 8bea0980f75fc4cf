"""Who may import whom. The two halves meet in job.py alone, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "batchinfer"

ALLOWED = {
    "__init__": {"llm"},
    "rules": set(),
    "__main__": {"rules", "job", "inquire", "bench", "doctor", "cluster", "engine.bundle"},
    "job": {"opening", "data", "cluster", "engine", "models.files", "fingerprint", "loop", "pipeline", "report"},
    "opening": {"data", "cluster", "models.identity", "models.pool_spec", "engine.constrain", "fingerprint", "report"},
    "fingerprint": {"data"},
    "inquire": {"data", "estimate", "engine", "models", "report"},
    "estimate": {"data", "engine", "feed", "models"},
    "feed": {"engine.planner"},
    "loop": {"data", "cluster", "engine.planner", "pipeline", "report"},
    "pipeline": set(),
    "report": set(),
    "bench": {"data", "engine", "feed", "models", "workloads"},
    "workloads": set(),
    "doctor": {"cluster", "engine", "ops", "_ops", "_engine", "_gpu"},
    "llm": {"arguments", "rules", "engine", "feed", "models.pool_spec"},
    "arguments": {"models.tokenizer"},
    "data": {"sandbox"},
    "cluster": {"_process"},
    "engine": {"models", "ops", "_engine"},
    "models": {"ops", "sandbox"},
    "ops": {"_ops", "_gpu"},
    "sandbox": set(),
    "config": set(),
    "types": set(),
}
"""Part -> parts that it may import beside itself, types, config and the version in __init__."""

ONLY_IN = {
    "mpi4py": {"cluster"},
    "pyarrow": {"data"},
    "hydra": {"__main__"},
    "omegaconf": {"__main__"},
    "torch": {"engine", "models", "ops", "llm", "bench"},
    "triton": {"ops"},
    "transformers": {"models"},
    "tokenizers": {"models"},
    "rich": {"report"},
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = {alias.name for alias in node.names}
            submodules = {n for n in names if _exists(f"{node.module}.{n}")}
            yield from (f"{node.module}.{name}" for name in submodules)
            if names - submodules:
                yield node.module


def _exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or path.is_dir() or re.fullmatch(r"batchinfer\._[a-z]+", module) is not None


def broken_rules(path: Path) -> Iterator[str]:
    part = part_of(path)
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first in ONLY_IN and part not in ONLY_IN[first]:
            yield f"{name} belongs to {sorted(ONLY_IN[first])}"
        if first == "batchinfer" and rest:
            other = rest.split(".")[0]
            if not ({rest, other} & (ALLOWED[part] | {part, "types", "config"})):
                yield f"{part} may not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_keep_to_the_layers(path: Path) -> None:
    assert list(broken_rules(path)) == []


def test_every_part_has_its_rule() -> None:
    assert {part_of(path) for path in MODULES} <= set(ALLOWED)


def test_no_source_of_the_extension_includes_torch() -> None:
    """Ops take addresses, so that one build goes with every torch; only headers of libtorch would tie it to one."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".hpp", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 20
    header = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')
    assert [str(path) for path in sources if header.search(path.read_text())] == []


def test_the_walk_sees_what_it_should(tmp_path: Path) -> None:
    text = "def f():\n    from batchinfer import job\n    import torch.nn\n    from batchinfer.data.plan import Plan\n"
    (tmp_path / "x.py").write_text(text)
    assert set(imports(tmp_path / "x.py")) == {"batchinfer.job", "torch.nn", "batchinfer.data.plan"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("batchinfer.__main__", {"torch", "pyarrow", "mpi4py", "hydra", "omegaconf", "rich"}),
        ("batchinfer.inquire", {"torch", "mpi4py", "hydra"}),
        ("batchinfer.job", {"torch", "mpi4py", "hydra", "transformers"}),
        ("batchinfer.models.identity", {"torch"}),
    ],
)
def test_what_a_module_loads(module: str, absent: set[str]) -> None:
    """Help, status and verify start fast on a login node, also where torch or MPI is broken."""
    code = f"import {module}, sys; print(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
