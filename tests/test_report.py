"""Counters, the progress line, the summary."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest

from batchinfer.report import REPORT_SECONDS, Counters, Meter, Progress, duration, stages, summary, total
from batchinfer.types import Completion, EngineStats, ErrorCode, RowError, Sample, StepWork


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_meter_counts_rows_and_looks_at_the_engine_now_and_then() -> None:
    clock, stats = Clock(), EngineStats(prompt_tokens=7, output_tokens=1, running=1, pages_used=2, pages_total=4)
    meter = Meter(lambda: stats, lambda: {"reading": clock.now - 1000}, lambda: 5, clock)
    first = meter.report()
    want = Counters(0, 0, 7, 1, 1, 2, 4, shared_prompt_tokens=5, seconds={"reading": 0.0})
    assert first.host_bytes > 10_000_000
    assert first == dataclasses.replace(want, host_bytes=first.host_bytes)
    meter.count(Completion(0, 3, (Sample(np.zeros(1, np.int32), "a", "stop"),)))
    meter.count(Completion(1, 0, error=RowError(ErrorCode.NULL_PROMPT, "null")))
    stats.output_tokens = 9
    clock.now += REPORT_SECONDS / 2
    assert meter.report() is first
    fresh = meter.report(fresh=True)
    assert (fresh.rows, fresh.failed, fresh.output_tokens, fresh.seconds) == (2, 1, 9, {"reading": REPORT_SECONDS / 2})
    stats.output_tokens = 10
    clock.now += REPORT_SECONDS
    assert meter.report().output_tokens == 10


def test_totals_over_ranks() -> None:
    assert total([Counters(rows=2, running=3), None, Counters(rows=5, failed=1)]) == Counters(7, 1, running=3)
    assert total([]) == Counters()
    times = total([Counters(seconds={"idle": 1.0, "wait": 2.0}), Counters(seconds={"idle": 0.5, "forward": 4.0})])
    assert times.seconds == {"idle": 1.5, "wait": 2.0, "forward": 4.0}


@pytest.mark.feature("job", "progress: one live line on a terminal, a plain line a minute elsewhere, a summary")
def test_plain_lines_come_at_their_interval_with_rates_of_the_last_minute() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(rows=1000, done=100, seconds=60, stream=stream, clock=clock)
    progress.show([Counters(), None])
    clock.now += 59
    progress.show([Counters(rows=59), None])
    assert stream.getvalue() == ""
    clock.now += 1
    progress.show(
        [Counters(rows=60, failed=2, prompt_tokens=6000, output_tokens=60_000, running=8, pages_total=4), None]
    )
    clock.now += 60
    progress.show([Counters(180, 2, 12_000, 180_000, running=7, pages_used=3, pages_total=4), None])
    progress.close()
    first, second = stream.getvalue().splitlines()
    assert first == (
        "160/1,000 rows, 2 failed | prompt 100 tok/s | output 1,000 tok/s | 14:00 left | 8 running | KV 0 %"
    )
    assert second == (
        "280/1,000 rows, 2 failed | prompt 100 tok/s | output 2,000 tok/s | 6:00 left | 7 running | KV 75 %"
    )


def test_nothing_done_yet_divides_by_nothing() -> None:
    clock = Clock()
    line = Progress(rows=10, seconds=1, stream=io.StringIO(), clock=clock).line(Counters())
    assert "0/10 rows" in line
    assert "time left unknown" in line
    assert "KV -" in line


@pytest.mark.feature("job", "progress: one live line on a terminal, a plain line a minute elsewhere, a summary")
def test_a_terminal_gets_one_live_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, stream = Clock(), Terminal()
    progress = Progress(rows=1000, seconds=60, stream=stream, clock=clock)
    for rows in (1, 2, 3):
        clock.now += 1
        progress.show([Counters(rows=rows), None])
    progress.close()
    shown = stream.getvalue()
    assert shown.count("/1,000 rows") >= 3
    assert shown.count("\n") <= 1  # redrawn in place, cut to the terminal's width
    assert shown.rstrip("\r\n").endswith(("\x1b[?25h", "\x1b[2K"))  # the cursor is back, the line cleared


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3600, 3 * 86400 + 62)] == ["0:00", "1:00", "1:01", "1:00:00", "72:01:02"]


def test_the_summary_names_what_a_person_asks_first() -> None:
    counts = {"ok": 995, "error": 5, "error:NULL_PROMPT": 2, "error:BAD_MESSAGES": 3}
    counts |= {"prompt_tokens": 12_345, "completion_tokens": 67_890}
    times = {"seconds": 130.0, "computing_seconds": 120.0}
    text = summary(counts, Counters(rows=600, output_tokens=6000), times, 4, "/data/out")
    assert "1,000: 995 ok, 5 failed (BAD_MESSAGES 3, NULL_PROMPT 2)" in text
    assert "12,345 prompt, 67,890 output" in text
    assert "600 rows in 2:10 on 4 ranks, 50.0 output tok/s after loading" in text
    assert "/data/out" in text
    assert "waited" not in text  # no step was computed


@pytest.mark.feature("job", "the summary tells which queue was empty for how long, and where the engine's time went")
def test_the_summary_tells_who_waited_for_whom() -> None:
    seconds = {"no chunk": 10.0, "reading": 5.0, "tokenising": 0.0, "idle": 4.0, "backlog": 1.0}
    seconds |= {"read": 6.0, "tokenise": 9.0, "commit": 2.0, "schedule": 0.5, "forward": 150.0}
    counters = Counters(
        prompt_tokens=500,
        cached_prompt_tokens=380,
        needed_prompt_tokens=1000,
        shared_prompt_tokens=412,
        pages_peak=90,
        pages_total=100,
        preemptions=3,
        steps=7,
        prefill=StepWork(steps=2, seconds=8.0, tokens=16_000),
        decode=StepWork(steps=5, seconds=0.1, tokens=20),
        device_idle=0.9,
        host_bytes=2_500_000_000,
        seconds=seconds,
    )
    assert stages(counters, 200.0) == [
        "waited     no chunk 5.0%, reading 2.5%, tokenising 0.0%, idle 2.0%, backlog 0.5%",
        "worked     read 3.0%, tokenise 4.5%, commit 1.0%; engine: schedule 0.2%, forward 75.0%",
        "device     prefill 2 steps of 4,000.0 ms, 2,000 tok/s; decode 5 steps of 20.0 ms, 200 tok/s; 10.0% idle",
        "memory     2.5 GB of a host at most in a rank",
        "cache      38.0% of the prompt tokens found (41.2% shared by rows in hand together), "
        "90% of the KV pages used at most, 3 preemptions in 7 steps",
    ]
    on_gpu = dataclasses.replace(counters, device_bytes=77_900_000_000)
    lines = stages(on_gpu + counters, 200.0, (0.61, 0.78))
    assert lines[2].startswith(
        "device     prefill 4 steps of 4,000.0 ms, 2,000 tok/s, 61.0% of the roofline; decode 10 "
    )
    assert lines[2].endswith("200 tok/s, 78.0% of the roofline; 10.0% idle")
    assert lines[3] == "memory     2.5 GB of a host, 77.9 GB of a GPU at most in a rank"


@pytest.mark.feature("job", "the summary tells how many draft tokens were right (engine.lookup)")
def test_the_summary_tells_of_drafts() -> None:
    counters = Counters(steps=10, output_tokens=300, drafted_tokens=2000, accepted_tokens=100)
    assert stages(counters, 1.0)[5:] == ["drafts     5.0% of 2,000 tokens right, 1.50 tokens a sample and step"]
    assert len(stages(Counters(steps=10, output_tokens=300), 1.0)) == 5
