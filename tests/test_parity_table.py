"""The README's table of models: what its cells say of recorded sessions."""

from __future__ import annotations

import parity
from hardware_matrix import Session
from recorder import Fact

from batchinfer.models.architectures import ARCHITECTURES


def session(*facts: tuple[str, str, str, int, int]) -> Session:
    """Of (check and architecture, backend, how, passed, failed)."""
    found = {Fact("feature", name, backend, how): (passed, failed) for name, backend, how, passed, failed in facts}
    return Session("2026-01-01", "abc", "a machine", "pytest", found)


def cells(name: str, *sessions: Session) -> list[str]:
    (line,) = [line for line in parity.table(sessions).splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_cells_count_what_passed() -> None:
    llama, gpt = "LlamaForCausalLM", "GPT2LMHeadModel"
    one = session(
        (f"greedy tokens: {llama}", "cpu x86_64", "run", 6, 0),
        (f"greedy tokens: {gpt}", "cpu x86_64", "run", 1, 0),
        (f"logits: {llama}", "cpu x86_64", "run", 7, 0),
        (f"logits: {llama}", "cuda", "emulated", 4, 0),
        (f"logits: {llama}", "xpu", "emulated", 4, 0),
    )
    other = session((f"logits: {llama}", "cuda", "run", 4, 0), (f"logits: {llama}", "cpu x86_64", "run", 5, 0))
    assert cells(llama, one, other) == ["24, 6 rope types", "7", "", "", "4", "", "4"]
    assert cells(gpt, one) == ["20", "", "", "", "", "", ""]
    wrong = session((f"logits: {llama}", "cuda", "run", 3, 1))
    assert cells(llama, one, other, wrong)[4] == "FAILS"


def test_what_nobody_has_shown_is_empty() -> None:
    lines = parity.table([]).splitlines()[2:]
    assert len(lines) == len(ARCHITECTURES)
    assert all(set(line.split("|", 2)[2]) <= {" ", "|"} for line in lines)
