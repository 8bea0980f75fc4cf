"""Spack's package language, as far as the recipes here use it: a directive is written down instead of obeyed."""

from __future__ import annotations

import contextlib
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

DIRECTIVES = ("version", "variant", "depends_on", "conflicts", "requires", "license")


@dataclass(frozen=True)
class Directive:
    """``name(*args, when=when, **options)``, with what the surrounding default_args() say."""

    name: str
    args: tuple[Any, ...]
    when: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recipe:
    """A package.py after its execution: its class, and the directives in their order."""

    package: type
    directives: list[Directive]

    def of(self, name: str) -> list[Directive]:
        return [directive for directive in self.directives if directive.name == name]


class FakeSpec:
    """A concrete spec: ``satisfies`` knows variants alone; ``spec["name"].prefix`` is /spack/name."""

    def __init__(self, *on: str, **values: tuple[str, ...]):
        self.on = on
        self.variants = {name: types.SimpleNamespace(value=value) for name, value in values.items()}

    def satisfies(self, text: str) -> bool:
        assert re.fullmatch(r"\+\w+", text), f"the stub does not know {text!r}"
        return text[1:] in self.on

    def __getitem__(self, name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(prefix=FakePrefix(f"/spack/{name}"))


class FakePrefix(str):
    def __getattr__(self, name: str) -> FakePrefix:
        return FakePrefix(f"{self}/{name}")


def load(path: Path) -> Recipe:
    """Execute a package.py. Raises what it raises; a name that is not part of the stub is a NameError."""
    directives: list[Directive] = []
    defaults: list[dict[str, Any]] = []

    def directive(name: str) -> Any:
        def write_down(*args: Any, **options: Any) -> None:
            merged = {key: value for default in defaults for key, value in default.items()} | options
            directives.append(Directive(name, args, merged.pop("when", ""), merged))

        return write_down

    @contextlib.contextmanager
    def default_args(**options: Any) -> Iterator[None]:
        defaults.append(options)
        yield
        defaults.pop()

    language = types.ModuleType("spack.package")
    language.__dict__.update({name: directive(name) for name in DIRECTIVES})
    language.__dict__.update(
        default_args=default_args,
        ancestor=lambda path, levels: str(Path(path).parents[levels - 1]),
        join_path=lambda *parts: "/".join(parts),
        determine_number_of_jobs=lambda parallel: 3,
        EnvironmentModifications=object,
    )
    modules = {
        "spack": types.ModuleType("spack"),
        "spack.package": language,
        **{
            name: types.ModuleType(name)
            for name in ("spack_repo", "spack_repo.builtin", "spack_repo.builtin.build_systems")
        },
        **_build_system("cuda", "CudaPackage", cuda_arch_values=("60", "70", "80", "90", "90a")),
        **_build_system("rocm", "ROCmPackage", amdgpu_targets=("gfx90a", "gfx942", "gfx1100")),
        **_build_system("python", "PythonPackage"),
    }
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": path.parent.name}
    with mock.patch.dict(sys.modules, modules):
        exec(compile(path.read_text(), path, "exec"), namespace)
    name = "".join(part.capitalize() for part in path.parent.name.split("_"))
    return Recipe(namespace[name], directives)


def _build_system(name: str, cls: str, **members: Any) -> dict[str, types.ModuleType]:
    module = types.ModuleType(f"spack_repo.builtin.build_systems.{name}")
    setattr(module, cls, type(cls, (), members))
    return {module.__name__: module}
