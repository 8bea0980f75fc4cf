"""The timeline of steps."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from engine.tiny_engine import make_decoder, make_engine, random_prompts, run

from batchinfer.engine.trace import BUFFERED, TRACKS, Trace, path_of_rank
from batchinfer.types import JobError, Request, SamplingParams


def test_the_number_of_a_rank_stands_before_the_ending() -> None:
    assert path_of_rank("/a/trace.json", 3) == "/a/trace.3.json"
    assert path_of_rank("trace", 0) == "trace.0"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"engine\.profile='.*' can't be written") as error:
        Trace(str(tmp_path / "none" / "trace.json"))
    assert error.value.exit_code == 73


def test_many_events_are_one_good_file(tmp_path: Path) -> None:
    trace = Trace(str(tmp_path / "t.json"))
    for i in range(2 * BUFFERED + 3):
        trace.span("host", "step", i, i + 0.5, number=i)
    trace.close()
    events = [e for e in json.loads((tmp_path / "t.json").read_text()) if e["ph"] == "X"]
    assert [e["args"]["number"] for e in events] == list(range(2 * BUFFERED + 3))
    assert events[2]["ts"] == 2e6
    assert events[2]["dur"] == 5e5


@pytest.mark.feature("engine", "engine.profile: a timeline of host and device, step by step, for the Chrome viewers")
def test_phases_lie_in_steps_and_device_steps_follow_each_other(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    engine = make_engine(make_decoder(), trace=Trace(str(path)))
    run(engine, [Request(i, p, SamplingParams(max_tokens=9)) for i, p in enumerate(random_prompts(12))])
    stats = engine.stats()
    engine.close()
    events = json.loads(path.read_text())
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert set(names.values()) == set(TRACKS)
    spans = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            spans[names[event["tid"]], event["name"]].append((event["ts"], event["ts"] + event["dur"]))
    whole = spans["host", "step"]
    for name in ("schedule", "launch", "wait", "output"):
        assert len(spans["host", name]) == stats.steps
        for begin, end in spans["host", name]:  # each within one step
            assert any(a <= begin and end <= b + 0.002 for a, b in whole)
    inside = sorted(span for name in ("schedule", "launch", "wait", "output") for span in spans["host", name])
    assert all(a[1] <= b[0] + 0.002 for a, b in pairwise(inside))
    device = sorted(spans["device", "prefill"] + spans["device", "decode"])
    assert len(device) == stats.steps == stats.prefill.steps + stats.decode.steps
    assert all(a[1] <= b[0] + 0.002 for a, b in pairwise(device))
    seconds = sum(end - begin for begin, end in device) / 1e6
    assert seconds == pytest.approx(stats.prefill.seconds + stats.decode.seconds, rel=1e-3)


def test_a_full_file_system_ends_the_trace_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    trace = Trace("/dev/full")
    for i in range(2 * BUFFERED + 3):
        trace.span("host", "step", i, i + 0.5)
    trace.close()
    assert capfd.readouterr().err.count("engine.profile=/dev/full ends here: [Errno 28]") == 1
