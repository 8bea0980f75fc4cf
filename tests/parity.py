"""The README's table of models: how many tests have found whose answers right, made of what recorder.py has written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from hardware_matrix import Session, committed
from models.drawn_models import FAMILIES

from batchinfer.models.architectures import ARCHITECTURES

COLUMNS = (
    ("greedy tokens, random configs", "greedy tokens", "cpu", "run"),
    ("logits, float32", "logits", "cpu", "run"),
    ("bfloat16", "logits in bfloat16", "cpu", "run"),
    ("weights from GGUF", "weights from GGUF", "cpu", "run"),
    ("logits on CUDA", "logits", "cuda", "run"),
    ("by Triton there", "logits", "triton on cuda", "run"),
    ("by SYCL's kernels, on a CPU", "logits", "xpu", "emulated"),
)
"""Title, check (``@pytest.mark.parity(check, architecture)``), backend and how, as of recorder.Fact."""


def table(sessions: Sequence[Session] | None = None) -> str:
    """A line for each architecture."""
    counts: dict[tuple[str, str, str], list[tuple[int, int]]] = defaultdict(list)
    for session in committed() if sessions is None else sessions:
        for fact, outcomes in session.facts.items():
            if fact.kind == "feature":
                counts[fact.name, fact.backend.removesuffix(" x86_64"), fact.how].append(outcomes)
    lines = []
    for name in ARCHITECTURES:
        found = [counts.get((f"{check}: {name}", backend, how), []) for _, check, backend, how in COLUMNS]
        cells = [_cell(name, title, outcomes) for (title, *_), outcomes in zip(COLUMNS, found, strict=True)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    titles = " | ".join(title for title, *_ in COLUMNS)
    return "\n".join([f"| architecture | {titles} |", f"|---|{'---|' * len(COLUMNS)}", *lines])


def _cell(name: str, title: str, outcomes: list[tuple[int, int]]) -> str:
    """Tests that passed in one session; a failure in any is all it says."""
    if any(failed for _, failed in outcomes):
        return "FAILS"
    passed = max((passed for passed, _ in outcomes), default=0)
    if not title.startswith("greedy") or not passed:
        return str(passed or "")
    ropes = f", {passed} rope types" if len(FAMILIES[name].ropes) > 1 else ""
    return f"{passed * FAMILIES[name].configs_of_a_rope_type}{ropes}"
