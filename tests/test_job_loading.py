"""How a job loads its weights: what it records of them, and how a signal ends it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_engine import FakeEngine
from test_job import configure, inputs, run  # noqa: F401

from batchinfer import job
from batchinfer.models.files import Block
from batchinfer.types import ExitCode, JobError


def loading(data: bytes, between: Callable[[], object] = lambda: None) -> Callable[..., FakeEngine]:
    """A load_engine that gets ``data`` as weights, in blocks of ten bytes; ``between`` is called after each."""

    def load(*_: Any, source: Any, **__: Any) -> FakeEngine:
        blocks = [Block("weights", at, 10) for at in range(0, len(data), 10)]
        read = lambda block, out: out.__setitem__(slice(None), data[block.offset : block.offset + 10])  # noqa: E731
        assert source.value(lambda: "header") == "header"
        got = b""
        for view in source.stream(blocks, read):
            got += view
            between()
        assert got == data
        return FakeEngine()

    return load


@pytest.mark.feature(
    "job", "the bytes of the weights are hashed as they are read: a change between two attempts is said"
)
def test_weights_that_changed_between_two_attempts(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = configure(inputs, tmp_path / "out")

    def crash(*_: Any, **options: Any) -> FakeEngine:
        loading(b"a" * 50)(**options)
        return FakeEngine(fail_at_step=60)

    with pytest.raises(JobError):
        run(config, crash)
    assert "batchinfer: weights 0.00 GB in 0.0 s" in capfd.readouterr().err
    with pytest.raises(JobError, match=r"are not those that attempt 1 loaded .*; job\.strict_resume=false goes on"):
        run(configure(inputs, tmp_path / "out", job__strict_resume=True), loading(b"b" * 50))
    assert run(config, loading(b"b" * 50)) == ExitCode.COMPLETE
    assert "the weights in fake are not those that attempt" in capfd.readouterr().err
    ended = json.loads((tmp_path / "out" / "_batchinfer" / "attempts" / "000003.end.json").read_text())
    assert (ended["weights"]["bytes"], ended["weights"]["read"], ended["weights"]["ranks"]) == (50, 50, 1)
    provenance = [
        json.loads(pq.read_metadata(part).metadata[b"batchinfer"])["provenance"]
        for part in sorted((tmp_path / "out").glob("part-*.parquet"))
    ]
    assert provenance[-1]["weights"] == ended["weights"]["digest"]
    assert len({entry["weights"] for entry in provenance}) == 2


def test_a_signal_ends_the_loading(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    come: list[str] = []
    monkeypatch.setattr(job.signals, "received", lambda: come[0] if come else None)
    calls: list[None] = []

    def between() -> None:
        calls.append(None)
        come.append("SIGUSR1")

    config = configure(inputs, tmp_path / "out")
    assert run(config, loading(b"a" * 500, between)) == ExitCode.INCOMPLETE
    assert len(calls) == 1
    come.clear()
    assert run(config, loading(b"a" * 500)) == ExitCode.COMPLETE
