"""What ran where. With BATCHINFER_RESULTS=FILE a run of pytest appends to FILE which ops its tests have called on which
backend, which features they have shown there (``@pytest.mark.hardware(feature)``), which models' answers were those of
transformers or of another backend (``parity(check, architecture)``), and how the tests ended.

FILE holds sessions one after the other, in JSON: a line that says where and when, then one for each fact. Nothing is
told to the recorder: a backend's ops are watched while a test runs, and count if it passes. What only a compiler has
seen is noted by the tests and scripts that compile (:func:`note`, :func:`write`). BATCHINFER_COMMIT names the commit
where there is no git. The README's table is made of tests/results/ by hardware_matrix.py.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import platform
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
WITH_OPS = ("tests/ops/", "tests/gpu/", "tests/csrc/", "tests/sycl/")
"""Whose tests hold ops against the reference: calls elsewhere prove none."""

BACKENDS = (
    ("batchinfer.ops.native", "NativeOps"),
    ("batchinfer.ops.native_linear", "NativeLinear"),
    ("batchinfer.ops.texts", "TextAttention"),
    ("batchinfer.ops.device", "DeviceOps"),
)
"""Classes whose methods are the ops of all backends but the reference."""

NO_OPS = frozenset({"activations", "linear_inputs", "zeros"})
"""What the op list has besides: answers, and memory."""

_OF_THEIR_NAME = "rms_norm silu_mul gelu_mul rope_and_cache copy_pages feed_back plan_attention attention sample"
FUNCTIONS = {op: op for op in _OF_THEIR_NAME.split()}
FUNCTIONS |= {"embed": "lookup", "gather_rows": "lookup"}
"""Ops with kernels in csrc/gpu and csrc/sycl, and the extension's functions."""

_EASY = dict.fromkeys(("add", "softcap", "activate", "attend_texts", "copy", "sink"), "torch")
_GPU = _EASY | {"pack_weight": "torch", "linear": "torch", "layer_norm": "torch", "mix_experts": "Triton"}
_ELSEWHERE = _GPU | {"gated_linear": "other ops"}
NO_KERNEL = {
    "cpu": {
        **{"attend_texts": "torch", "copy": "numpy", "sink": "numpy"},
        **{"copy_pages": "memcpy", "mix_experts": "other ops", "feed_back": "not needed"},
    },
    **{"cuda": _GPU, "rocm": _ELSEWHERE, "xpu": _ELSEWHERE},
    "triton": _EASY | {"gated_linear": "other ops", "feed_back": "torch"},  # products with codes are Triton's
}
"""Ops for which a backend has no kernel of its own, and what serves them: there is nothing of ours to emulate, to
interpret or to compile."""


class Fact(NamedTuple):
    """``kind``: op or feature. ``backend``: cpu x86_64, cpu aarch64, cuda, rocm, xpu, triton on cuda, triton on rocm,
    triton on xpu; triton alone in the interpreter. ``how``: run, on such hardware; emulated, by another processor;
    interpreted; compiled."""

    kind: str
    name: str
    backend: str
    how: str


def machine_kind() -> str:
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def computes_on(ops: Any) -> tuple[str, str]:
    """Backend and how, of an instance of one of the classes above."""
    bases = {base.__name__ for base in type(ops).__mro__}
    kind = ops.device.type if hasattr(ops, "device") else "cpu"
    if "CompilingOps" in bases:
        return f"triton on {'rocm' if ops.target.gpu.backend == 'hip' else 'cuda'}", "compiled"
    if "TritonOps" in bases:
        import torch

        vendor = "rocm" if kind == "cuda" and torch.version.hip else kind
        return ("triton", "interpreted") if kind == "cpu" else (f"triton on {vendor}", "run")
    if "GpuOps" in bases:
        return ops._gpu.compiled_for, "emulated" if kind == "cpu" else "run"
    return f"cpu {machine_kind()}", "run"


def shows_a_kernel(op: str, backend: str, how: str) -> bool:
    """Or else what torch has done on the host, say, would count for a GPU."""
    return how == "run" or op not in NO_KERNEL[backend.split()[0]]


class Recorder:
    """A plugin of pytest: what the tests of a session have shown. ``facts``: fact -> outcome -> files of tests."""

    def __init__(self) -> None:
        self.facts: dict[Fact, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self._called: set[tuple[str, str, str]] = set()
        self._features: set[str] = set()

    def watch(self) -> None:
        """Every op's call is seen from here on, if it returns."""
        wanted = op_list()
        for module, name in BACKENDS:
            with suppress(ImportError):  # a machine with a GPU may have built no more than its kernels
                backend = getattr(importlib.import_module(module), name)
                for op, function in list(vars(backend).items()):
                    if op in wanted:
                        setattr(backend, op, self._seen(op, function))

    def _seen(self, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(ops: Any, *args: Any, **options: Any) -> Any:
            result = function(ops, *args, **options)
            self._called.add((op, *computes_on(ops)))
            return result

        return call

    def note(self, backend: str, how: str, ops: Iterable[str]) -> None:
        self._called |= {(op, backend, how) for op in ops}

    def pytest_runtest_logstart(self) -> None:
        self._called, self._features = set(), set()

    def pytest_runtest_setup(self, item: Any) -> None:
        self._features = {marker.args[0] for marker in item.iter_markers("hardware")}
        self._features |= {": ".join(marker.args) for marker in item.iter_markers("parity")}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" or report.outcome == "skipped":
            return
        file = report.nodeid.split("::")[0]
        shown = {call for call in self._called if not call[0] or shows_a_kernel(*call)}
        facts = {Fact("feature", name, *where) for name in self._features for _, *where in shown}
        if file.startswith(WITH_OPS):
            facts |= {Fact("op", *call) for call in shown if call[0]}
        for fact in facts:
            self.facts[fact][report.outcome].append(file)

    def pytest_sessionfinish(self, session: Any) -> None:
        given = [str(argument).replace(f"{ROOT}/", "") for argument in session.config.invocation_params.args]
        write(" ".join(["pytest", *given]), self.facts)


def op_list() -> list[str]:
    from batchinfer.ops import Ops

    return [name for name in vars(Ops) if callable(vars(Ops)[name]) and not name.startswith("_") and name not in NO_OPS]


_started: list[Recorder] = []


def start() -> Recorder | None:
    """The session's recorder, if BATCHINFER_RESULTS asks for one."""
    if "BATCHINFER_RESULTS" not in os.environ:
        return None
    os.environ["BATCHINFER_RESULTS"] = os.path.abspath(os.environ["BATCHINFER_RESULTS"])  # for processes elsewhere, too
    _started.append(Recorder())
    _started[0].watch()
    return _started[0]


def note(backend: str, how: str, ops: Iterable[str] = ("",)) -> None:
    """For a test: if it passes, it has shown these ops, or its features alone, where the recorder can't watch them."""
    for recorder in _started:
        recorder.note(backend, how, ops)


def write(command: str, facts: dict[Fact, dict[str, list[str]]]) -> None:
    """Append a session to the file that BATCHINFER_RESULTS names; none without it, or without facts."""
    path = os.environ.get("BATCHINFER_RESULTS")
    if not path or not facts:
        return
    lines: list[dict[str, Any]] = [session(command)]
    for fact, outcomes in sorted(facts.items()):
        files = sorted({file for of_one in outcomes.values() for file in of_one})
        counts = {outcome: len(outcomes.get(outcome, ())) for outcome in ("passed", "failed")}
        lines.append(fact._asdict() | counts | {"tests": files})
    with open(path, "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def write_compiled(command: str, backend: str, ok: bool) -> None:
    """For a script that compiles all kernels: whether each stayed within its bounds."""
    outcome = {"passed" if ok else "failed": [command]}
    write(command, {Fact("op", op, backend, "compiled"): outcome for op in FUNCTIONS})


def session(command: str) -> dict[str, str]:
    """Where and when."""
    return {"date": date.today().isoformat(), "commit": commit(), "machine": machine(), "command": command}


def commit() -> str:
    given = os.environ.get("BATCHINFER_COMMIT")
    if given:
        return given
    done = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> str:
    """The GPU, or else the processor."""
    with suppress(ImportError):
        import torch

        for kind in (torch.cuda, torch.xpu):
            if kind.is_available():
                return kind.get_device_name()
    with suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return found[1] if found else machine_kind()
    return machine_kind()
