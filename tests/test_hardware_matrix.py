"""The table of hardware: what the recorder sees of a test, and what the README makes of it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import hardware_matrix
import pytest
import readme_tables
import recorder
import torch
from hardware_matrix import COLUMNS, FEATURES, Session, cell, missing
from recorder import Fact, Recorder, computes_on

from batchinfer.ops.gpu import GpuOps
from batchinfer.ops.native import NativeOps


def extension(vendor: str) -> ModuleType:
    module = ModuleType("_gpu")
    module.compiled_for = vendor
    return module


def ends(seen: Recorder, outcome: str, test: str = "tests/ops/test_some.py::test[1]") -> None:
    seen.pytest_runtest_logreport(SimpleNamespace(when="call", outcome=outcome, nodeid=test))


def begins(seen: Recorder, *features: str) -> None:
    seen.pytest_runtest_logstart()
    marked = [SimpleNamespace(args=(feature,)) for feature in features]
    seen.pytest_runtest_setup(SimpleNamespace(iter_markers=lambda name: marked))


def test_ops_say_where_they_compute() -> None:
    cpu = f"cpu {recorder.machine_kind()}"
    assert computes_on(NativeOps("cpu", 1)) == (cpu, "run")
    for vendor in ("cuda", "rocm", "xpu"):
        assert computes_on(GpuOps(torch.device("cpu"), extension(vendor))) == (vendor, "emulated")
    assert computes_on(GpuOps(torch.device("xpu", 0), extension("xpu"))) == ("xpu", "run")


def test_triton_says_where_it_compiles_for() -> None:
    pytest.importorskip("triton")
    from batchinfer.ops.triton.backend import TritonOps
    from batchinfer.ops.triton.compiling import CompilingOps
    from batchinfer.ops.triton.targets import TARGETS

    assert computes_on(TritonOps("cpu")) == ("triton", "interpreted")
    compiling = CompilingOps.__new__(CompilingOps)
    compiling.device = torch.device("meta")
    for target, backend in (("sm_90", "triton on cuda"), ("gfx942", "triton on rocm")):
        compiling.target = TARGETS[target]
        assert computes_on(compiling) == (backend, "compiled")


def test_calls_count_if_they_return_and_their_test_passes() -> None:
    seen, ops = Recorder(), NativeOps("cpu", 1)
    add = seen._seen("add", NativeOps.add)
    fact = Fact("op", "add", *computes_on(ops))
    begins(seen, "LoRA adapters")
    with pytest.raises(ValueError, match="residual has dtype"):
        add(ops, torch.zeros(1, 4), torch.zeros(1, 4).half())
    ends(seen, "passed")
    assert not seen.facts
    begins(seen, "LoRA adapters")
    add(ops, torch.zeros(1, 4), torch.zeros(1, 4))
    ends(seen, "passed")
    ends(seen, "failed", "tests/ops/test_other.py::test")
    assert seen.facts.pop(Fact("feature", "LoRA adapters", *fact[2:])).keys() == {"passed", "failed"}
    assert seen.facts.pop(fact) == {"passed": ["tests/ops/test_some.py"], "failed": ["tests/ops/test_other.py"]}
    assert not seen.facts
    ends(seen, "passed", "tests/engine/test_some.py::test")  # holds no op against the reference
    assert set(seen.facts) == {Fact("feature", "LoRA adapters", *fact[2:])}


def test_what_torch_does_on_the_host_shows_nothing_of_a_gpu() -> None:
    seen = Recorder()
    begins(seen, "encoders")
    seen.note("rocm", "emulated", ["attend_texts"])
    ends(seen, "passed")
    assert not seen.facts
    begins(seen)
    seen.note("rocm", "emulated", ["linear", "rms_norm"])
    seen.note("cuda", "run", ["linear"])
    ends(seen, "passed")
    assert set(seen.facts) == {Fact("op", "rms_norm", "rocm", "emulated"), Fact("op", "linear", "cuda", "run")}


def test_a_session_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    monkeypatch.setenv("BATCHINFER_RESULTS", str(path))
    monkeypatch.setenv("BATCHINFER_COMMIT", "abc")
    recorder.write("pytest", {})
    assert not path.exists()
    facts = {Fact("op", "add", "cuda", "run"): {"passed": ["a", "b"], "failed": ["a"]}}
    for command in ("pytest one", "pytest two"):
        recorder.write(command, facts)
    one, two = hardware_matrix.read([path])
    assert (one.command, two.command, one.commit) == ("pytest one", "pytest two", "abc")
    assert one.facts == two.facts == {Fact("op", "add", "cuda", "run"): (2, 1)}


def shown(*facts: tuple[str, str, str], passed: int = 1, failed: int = 0) -> Session:
    found = {Fact("op", *fact): (passed, failed) for fact in facts}
    return Session("2026-01-01", "abc", "a machine", "pytest", found)


def test_cells() -> None:
    sessions = [
        shown(("sample", "rocm", "compiled"), ("mix_experts", "triton on rocm", "compiled")),
        shown(("sample", "rocm", "emulated"), ("sample", "cuda", "emulated"), ("mix_experts", "triton", "interpreted")),
        shown(("sample", "cuda", "run")),
        shown(("embed", "cuda", "run"), passed=0, failed=0),
        shown(("attention", "cuda", "run"), failed=1),
    ]
    assert cell(sessions, "op", "sample", "cuda") == "run [3]"
    assert cell(sessions, "op", "sample", "rocm") == "emulated [2], compiled [1]"
    assert cell(sessions, "op", "sample", "xpu") == "no"
    assert cell(sessions, "op", "embed", "cuda") == "no"
    assert cell(sessions, "op", "attention", "cuda") == "FAILS [5]"
    assert cell(sessions, "op", "linear", "rocm") == "torch"
    assert cell(sessions, "op", "mix_experts", "rocm") == "Triton: interpreted [2], compiled [1]"
    assert cell(sessions, "op", "mix_experts", "triton on cuda") == "interpreted [2]"
    assert cell(sessions, "feature", "sample", "cuda") == "no"


def test_what_a_run_of_now_lacks() -> None:
    everything = [(op, column, "run") for op in recorder.op_list() for column in COLUMNS]
    now = shown(*everything)
    assert missing([now], [now]) == []
    assert missing([shown(*everything[1:])], []) == [f"op {everything[0][0]}: nothing on {COLUMNS[0]}"]
    before = shown(("sample", "rocm", "emulated"))
    assert missing([now], [before]) == [
        "op sample: emulated on rocm is in tests/results/ci.jsonl, and not here",
    ]
    assert len(missing([shown(*everything, failed=1)], [])) == len(everything)


def test_no_cell_says_run_without_a_test_that_passed() -> None:
    """Read from the README and the files themselves."""
    sessions: list[list[dict]] = []
    for path in sorted(hardware_matrix.RESULTS.glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            sessions.append([]) if "command" in line else sessions[-1].append(line)
    rows = [line.split("|")[1:-1] for line in readme_tables.in_readme("hardware").splitlines() if line.startswith("|")]
    ops = [row[0].strip(" `") for row in rows[2:] if "`" in row[0]]
    assert ops == recorder.op_list()
    for first, *cells in rows[2:]:
        for column, text in zip(COLUMNS, cells, strict=True):
            for number in re.findall(r"\d+", text) if text.startswith(" run") else ():
                asked = {"name": first.strip(" `"), "backend": column, "how": "run", "failed": 0}
                found = [line for line in sessions[int(number) - 1] if asked.items() <= line.items()]
                assert any(line["passed"] for line in found), (first, column)


def test_tests_are_marked_with_features_of_the_table() -> None:
    marks = set()
    for path in recorder.ROOT.glob("tests/**/test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "hardware":
                marks.add(ast.literal_eval(node.args[0]))
    assert marks == set(FEATURES)
