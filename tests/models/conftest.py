"""Fixtures of the model tests: tiny models, built once, and copies of them to spoil."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from models.tiny_models import TinyModel, build_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """tiny(name): the model of that name in TINY, built once."""
    built: dict[str, TinyModel] = {}

    def build(name: str) -> TinyModel:
        if name not in built:
            built[name] = build_model(name, tmp_path_factory.mktemp(name))
        return built[name]

    return build


@pytest.fixture
def copy_of(tiny: Callable[[str], TinyModel], tmp_path: Path) -> Callable[[str], Path]:
    """copy_of(name): a folder with the model's config and weights that the test may spoil."""

    def copy(name: str = "llama") -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for file in tiny(name).folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return copy
