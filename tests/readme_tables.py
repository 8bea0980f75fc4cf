"""The README's tables, made of what they describe, so that they can't tell anything else.

python tests/readme_tables.py           print them
python tests/readme_tables.py --write   put them into README.md, between their comment lines
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

import hardware_matrix
import parity

from batchinfer.models.architectures import ARCHITECTURES, GGUF_ARCHITECTURES
from batchinfer.models.rope import ROPE_TYPES

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"
SETTINGS = TESTS.parent / "configs"
PACKAGE = TESTS.parent / "batchinfer"


def feature_matrix() -> str:
    """A line for each ``@pytest.mark.feature("area", "feature")``: what no test proves is not listed."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in sorted(TESTS.rglob("test_*.py")):
        for test in ast.walk(ast.parse(path.read_text())):
            for node in test.decorator_list if isinstance(test, ast.FunctionDef) else []:
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "feature":
                    area, feature = (ast.literal_eval(argument) for argument in node.args)
                    found[area, feature].add(f"`{path.relative_to(TESTS).as_posix()}`{_device_of(test)}")
    lines = [f"| {area} | {feature} | {', '.join(sorted(files))} |" for (area, feature), files in sorted(found.items())]
    return "\n".join(["| area | feature | proved by, in tests/ |", "|---|---|---|", *lines])


def _device_of(test: ast.FunctionDef) -> str:
    """What the fixtures of tests/gpu/conftest.py say. What has run on a GPU is in tests/gpu/RESULTS.md."""
    fixtures = {argument.arg for argument in test.args.args}
    if "real_gpu" in fixtures:
        return " (needs a GPU: not in CI)"
    if "quick_gpu" in fixtures:
        return " (needs a GPU: in CI with SYCL's kernels alone)"
    return " (emulated in CI)" if "gpu" in fixtures else ""


def configuration() -> str:
    """A line for each key of the YAML files, with the comment that stands above it there."""
    files = [SETTINGS / "config.yaml", *sorted(SETTINGS.glob("*/default.yaml"))]
    lines = [line for path in files for line in _keys_of(path)]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *sorted(lines)])


def _keys_of(path: Path) -> list[str]:
    section, comment, rows = path.parent.name, [], []
    for line in path.read_text().splitlines():
        if match := re.fullmatch(r"(?:  )?(\w+):\s*(\S.*)", line):
            name, value = match.groups()
            rows.append(f"| `{section}.{name}` | `{value}` | {' '.join(comment)} |")
            comment = []
        elif match := re.fullmatch(r"(job|bench|compact|convert|export|bundle):", line):
            section, comment = match[1], []
        elif line.lstrip().startswith("# "):
            comment.append(line.strip(" #"))
        elif line.startswith("  - ") or line == "defaults:" or not line:
            comment = []
    return rows


def models() -> str:
    """A line for each architecture: what it adds to Llama."""
    gguf = {name: key for key, name in GGUF_ARCHITECTURES.items()} | {"MistralForCausalLM": "llama"}
    lines = []
    for name, traits in ARCHITECTURES.items():
        possible = (
            ("LayerNorm", traits.layer_norm),
            ("norms behind attention and MLP", traits.post_norm),
            ("query/key norms", traits.qk_norm),
            ("sliding windows", traits.windows),
            ("two rope tables", traits.local_rope),
            ("part of a head rotates", traits.partial_rope),
            ("layers without rope", traits.nope_layers),
            ("learned positions", not traits.rope),
            ("soft caps", traits.soft_caps),
            ("scaled embedding", traits.scaled_embedding),
            ("multipliers", traits.multipliers),
            ("MLP without a gate", not traits.gated),
            ("MLP beside attention", traits.parallel),
            ("mixture of experts", traits.experts),
            ("attention sinks", traits.sinks),
            ("latent attention", traits.latent),
            ("experts in groups", traits.latent),
            ("experts in MXFP4 or plain", traits.stacked_experts),
        )
        notes = [note for note, has in possible if has]
        file = f"`{gguf[name]}`" if name in gguf else ""
        lines.append(f"| `{name}` | {file} | {', '.join(notes)} |")
    footer = f"Rope types: {', '.join(ROPE_TYPES)}."
    return "\n".join(["| architecture (config.json) | GGUF | besides Llama |", "|---|---|---|", *lines, "", footer])


def tree() -> str:
    """A line for each module, with the first line of its docstring."""
    lines = []
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda path: (len(path.parts), path)):
        name = path.relative_to(PACKAGE).as_posix()
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        if docstring and "configs" not in path.parts:
            lines.append(f"| `{name}` | {docstring.split(chr(10) * 2)[0].replace(chr(10), ' ')} |")
    return "\n".join(["| batchinfer/ | |", "|---|---|", *lines])


TABLES = {
    "configuration": configuration,
    "models": models,
    "parity": parity.table,
    "feature matrix": feature_matrix,
    "hardware": hardware_matrix.table,
    "modules": tree,
}


def in_readme(name: str) -> str:
    """The table as the README has it."""
    return re.split(_marks(name), README.read_text())[1].strip()


def _marks(name: str) -> str:
    return rf"<!-- (?:begin|end) {name}[^>]* -->"


if __name__ == "__main__":
    for name, table in TABLES.items():
        if "--write" in sys.argv:
            before, _, after = re.split(_marks(name), README.read_text())
            marked = f"<!-- begin {name}: made by `make readme` -->\n{table()}\n<!-- end {name} -->"
            README.write_text(before + marked + after)
        else:
            print(table(), end="\n\n")
