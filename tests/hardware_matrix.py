"""The README's table of ops and features against hardware, made of what recorder.py has written into tests/results/.

python tests/hardware_matrix.py --check FILE

Does FILE, of a run of now, show each op on every backend, and all that tests/results/ci.jsonl shows? CI asks that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recorder import NO_KERNEL, ROOT, Fact, op_list

RESULTS = ROOT / "tests/results"
COLUMNS = ("cpu x86_64", "cpu aarch64", "cuda", "rocm", "xpu", "triton on cuda", "triton on rocm")
TITLES = ("CPU, x86-64", "CPU, aarch64", "CUDA", "ROCm (HIP)", "oneAPI (SYCL)", "Triton, NVIDIA", "Triton, AMD")
NOT_RUN = ("emulated", "interpreted", "compiled")
"""How else it may be known, the best first."""

FEATURES = (
    "logits of every architecture",
    "continuous batching, greedy and sampled tokens",
    "steps recorded or captured, and repeated",
    "prompts in pieces, prefix cache",
    "beginnings that sequences share are read once",
    "sliding windows, soft caps",
    "mixtures of experts, routings of GPT-OSS and DeepSeek",
    "LoRA adapters",
    "weights kept as codes",
    "KV cache in 8 bits",
    "drafts by prompt lookup",
    "penalties, bans, log-probabilities",
    "task=embed, classify",
    "task=score",
    "encoders",
    "kernels compiled ahead",
)
"""What tests may be marked with (``hardware``), in the table's order."""


@dataclass
class Session:
    """A run of tests, or of a compiler over all ops, and what it has shown: fact -> (passed, failed)."""

    date: str
    commit: str
    machine: str
    command: str
    facts: dict[Fact, tuple[int, int]] = field(default_factory=dict)


def read(files: Iterable[Path]) -> list[Session]:
    sessions: list[Session] = []
    for path in files:
        for line in path.read_text().splitlines():
            given = json.loads(line)
            if "command" in given:
                sessions.append(Session(**given))
            else:
                fact = Fact(*(given[name] for name in Fact._fields))
                sessions[-1].facts[fact] = given["passed"], given["failed"]
    return sessions


def committed() -> list[Session]:
    return read(sorted(RESULTS.glob("*.jsonl")))


def cell(sessions: Sequence[Session], kind: str, name: str, column: str) -> str:
    """What the sessions say of an op or a feature there, with their numbers ("run [2]", "emulated [3], compiled [5]"),
    or whose kernel it is. A failure anywhere is all it says."""
    where = {column, column.split()[0]} if column.startswith("triton") else {column}  # the interpreter is all of theirs
    shown: dict[str, list[int]] = {}
    for number, session in enumerate(sessions, 1):
        for fact, (passed, failed) in session.facts.items():
            if (fact.kind, fact.name) == (kind, name) and fact.backend in where:
                for how in [fact.how] * (passed > 0) + ["FAILS"] * (failed > 0):
                    shown.setdefault(how, []).append(number)
    words = [how for how in ("FAILS", "run") if how in shown][:1] or [how for how in NOT_RUN if how in shown]
    if words:
        return ", ".join(f"{how} [{', '.join(map(str, sorted(set(shown[how]))))}]" for how in words)
    server = NO_KERNEL[column.split()[0]].get(name, "no")
    return f"Triton: {cell(sessions, kind, name, f'triton on {column}')}" if server == "Triton" else server


def table(sessions: Sequence[Session] | None = None) -> str:
    sessions = committed() if sessions is None else sessions
    rows = [("op", name) for name in op_list()] + [("feature", name) for name in FEATURES]
    lines = [f"| | {' | '.join(TITLES)} |", f"|---|{'---|' * len(TITLES)}"]
    for kind, name in rows:
        cells = [cell(sessions, kind, name, column) for column in COLUMNS]
        lines.append(f"| {f'`{name}`' if kind == 'op' else name} | {' | '.join(cells)} |")
    sources = [
        f"{number}. {session.date}, {session.commit}, {session.machine}: `{session.command}`"
        for number, session in enumerate(sessions, 1)
    ]
    return "\n".join([*lines, "", *sources]).strip()


def missing(now: Sequence[Session], before: Sequence[Session]) -> list[str]:
    """What a run of now should have shown, and has not: each op on every backend, all that was shown ``before``, and no
    failure."""
    lost = []
    for name in op_list():
        lost += [f"op {name}: nothing on {column}" for column in COLUMNS if cell(now, "op", name, column) == "no"]
    shown = {fact for session in now for fact, (passed, _) in session.facts.items() if passed}
    failed = {fact for session in now for fact, (_, failed) in session.facts.items() if failed}
    for fact in sorted({fact for session in before for fact in session.facts} - shown):
        lost.append(f"{fact.kind} {fact.name}: {fact.how} on {fact.backend} is in tests/results/ci.jsonl, and not here")
    return lost + [f"{fact.kind} {fact.name}: fails on {fact.backend}" for fact in sorted(failed)]


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] != "--check":
        sys.exit(__doc__)
    lost = missing(read([Path(sys.argv[2])]), read([RESULTS / "ci.jsonl"]))
    print("\n".join(lost) or "each op on every backend, and all of tests/results/ci.jsonl")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
