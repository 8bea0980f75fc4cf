"""Counters -> the progress line and the closing summary."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TextIO

from batchinfer.types import Completion, EngineStats

TERMINAL_SECONDS = 0.5
"""Between two looks of the live line."""

REPORT_SECONDS = 2.0
"""Between two reports of a rank to rank 0: a thousand ranks then cost it 500 small messages a second."""

WINDOW_SECONDS = 60.0
"""Rates are means over this time: steady to the eye, and fresh enough to show a rank that got stuck."""

WAITS = ("no chunk", "reading", "tokenising", "idle", "backlog")
"""Times of a rank's loop (loop.py, pipeline.py) in which a queue was empty, or that of finished chunks full."""

BESIDE = ("read", "tokenise", "commit")
"""Times that the threads beside the engine worked."""


@dataclass(frozen=True)
class Counters:
    """The state of one rank, or of several added up. Rows and tokens count from the start of this attempt; ``running``
    (sequences), ``pages_used`` and ``pages_total`` are of this moment. ``seconds``: how long what took or waited, see
    :func:`stages`."""

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    running: int = 0
    pages_used: int = 0
    pages_total: int = 0
    cached_prompt_tokens: int = 0
    pages_peak: int = 0
    preemptions: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: Counters) -> Counters:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "seconds"}
        names = [*self.seconds, *(name for name in other.seconds if name not in self.seconds)]
        return Counters(**sums, seconds={n: self.seconds.get(n, 0.0) + other.seconds.get(n, 0.0) for n in names})


def total(reports: Iterable[Counters | None]) -> Counters:
    """Sum over ranks; None stands for a rank that has not reported yet."""
    return sum((report for report in reports if report is not None), Counters())


class Meter:
    """Counts what comes out of one rank's engine. ``stats`` is the engine's method of that name, ``seconds`` tells the
    times of the stages around it."""

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        seconds: Callable[[], Mapping[str, float]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stats, self._seconds, self._clock = stats, seconds, clock
        self._rows = self._failed = 0
        self._taken = -math.inf
        self._report = Counters()

    def count(self, completion: Completion) -> None:
        self._rows += 1
        self._failed += completion.error is not None

    def report(self, fresh: bool = False) -> Counters:
        """The counters now, or those of up to ``REPORT_SECONDS`` ago unless ``fresh``: a message to rank 0 goes with
        each change."""
        now = self._clock()
        if fresh or now - self._taken >= REPORT_SECONDS:
            stats = self._stats()
            self._taken = now
            self._report = Counters(
                rows=self._rows,
                failed=self._failed,
                prompt_tokens=stats.prompt_tokens,
                output_tokens=stats.output_tokens,
                running=stats.running,
                pages_used=stats.pages_used,
                pages_total=stats.pages_total,
                cached_prompt_tokens=stats.cached_prompt_tokens,
                pages_peak=stats.pages_peak,
                preemptions=stats.preemptions,
                steps=stats.steps,
                drafted_tokens=stats.drafted_tokens,
                accepted_tokens=stats.accepted_tokens,
                seconds={name: round(s, 3) for name, s in {**self._seconds(), **stats.step_seconds}.items()},
            )
        return self._report


class Progress:
    """Shows how far a job is: one live line on a terminal, elsewhere a plain line every ``seconds``.

    ``rows`` is the job's number of rows, of which ``done`` were committed by earlier attempts.
    """

    def __init__(
        self,
        rows: int,
        done: int = 0,
        seconds: float = 60.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._rows, self._done = rows, done
        self._stream = stream or sys.stderr
        self._clock = clock
        self._live = _live_line(self._stream) if self._stream.isatty() else None
        self._interval = TERMINAL_SECONDS if self._live else seconds
        self._shown = clock()
        self._history = deque([(self._shown, Counters())])

    def show(self, reports: Iterable[Counters | None]) -> None:
        """Print if it is time to. ``reports``: the latest of every rank, None of those that have not sent one."""
        now = self._clock()
        if now - self._shown < self._interval:
            return
        self._shown = now
        counters = total(reports)
        self._history.append((now, counters))
        while now - self._history[0][0] > WINDOW_SECONDS and len(self._history) > 2:
            self._history.popleft()
        line = self.line(counters)
        if self._live:
            self._live.update(_one_line(line), refresh=True)
        else:
            print(line, file=self._stream, flush=True)

    def line(self, counters: Counters) -> str:
        """The text for this moment: rows, rates over the last minute, time left, what the engines hold."""
        start, before = self._history[0]
        seconds = max(self._clock() - start, 1e-9)
        rate = (counters.rows - before.rows) / seconds
        rows = self._done + counters.rows
        left = f"{duration((self._rows - rows) / rate)} left" if rate > 0 else "time left unknown"
        kv = f"{100 * counters.pages_used / counters.pages_total:.0f} %" if counters.pages_total else "-"
        return (
            f"{rows:,}/{self._rows:,} rows, {counters.failed:,} failed"
            f" | prompt {(counters.prompt_tokens - before.prompt_tokens) / seconds:,.0f} tok/s"
            f" | output {(counters.output_tokens - before.output_tokens) / seconds:,.0f} tok/s"
            f" | {left} | {counters.running:,} running | KV {kv}"
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live:
            self._live.stop()


def _live_line(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.live import Live

    live = Live("", console=Console(file=stream, markup=False, highlight=False), auto_refresh=False, transient=True)
    live.start()
    return live


def _one_line(text: str) -> Any:
    """Cut to the terminal's width: a line that wraps can't be drawn again in its place."""
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ellipsis")


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def summary(counts: Mapping[str, int], attempt: Counters, times: Mapping[str, float], ranks: int, output: str) -> str:
    """The closing lines. ``counts`` are the whole job's (keys ok, error, error:CODE, prompt_tokens,
    completion_tokens), ``attempt`` and ``times`` this attempt's: "seconds" in all, and "computing_seconds" without
    the loading of the model, to which the rate refers."""
    codes = {key.partition(":")[2]: n for key, n in sorted(counts.items()) if key.startswith("error:")}
    errors = f" ({', '.join(f'{code} {n:,}' for code, n in codes.items())})" if codes else ""
    rate = attempt.output_tokens / max(times["computing_seconds"], 1e-9)
    took = f"{duration(times['seconds'])} on {ranks} rank{'s' if ranks > 1 else ''}"
    return "\n".join(
        [
            f"rows       {counts['ok'] + counts['error']:,}: {counts['ok']:,} ok, {counts['error']:,} failed{errors}",
            f"tokens     {counts['prompt_tokens']:,} prompt, {counts['completion_tokens']:,} output",
            f"this run   {attempt.rows:,} rows in {took}, {rate:,.1f} output tok/s after loading",
            *stages(attempt, times["computing_seconds"] * ranks),
            f"output     {output}",
        ]
    )


def stages(attempt: Counters, seconds: float) -> list[str]:
    """Lines on who waited for whom, in shares of ``seconds`` of computing, all ranks together; none if no step was
    computed. "waited": for what the engine had to wait while it could have taken more rows, the end of the job, when
    there are none, included; "backlog": for the writer. "worked": what threads did beside the engine, and the engine's
    own parts."""
    if not attempt.steps:
        return []

    def shares(names: Iterable[str]) -> str:
        return ", ".join(f"{n} {attempt.seconds[n] / max(seconds, 1e-9):.1%}" for n in names if n in attempt.seconds)

    cached = attempt.cached_prompt_tokens / max(attempt.prompt_tokens, 1)
    peak = attempt.pages_peak / max(attempt.pages_total, 1)
    drafts = []
    if attempt.drafted_tokens:
        right = attempt.accepted_tokens / attempt.drafted_tokens
        each = attempt.output_tokens / max(attempt.output_tokens - attempt.accepted_tokens, 1)
        drafts = [
            f"drafts     {right:.1%} of {attempt.drafted_tokens:,} tokens right, {each:.2f} tokens a sample and step"
        ]
    own = [name for name in attempt.seconds if name not in (*WAITS, *BESIDE)]
    return [
        f"waited     {shares(WAITS)}",
        f"worked     {shares(BESIDE)}; engine: {shares(own)}",
        f"cache      {cached:.1%} of the prompt tokens found, {peak:.0%} of the KV pages used at most, "
        f"{attempt.preemptions:,} preemptions in {attempt.steps:,} steps",
        *drafts,
    ]


def say(text: str) -> None:
    """A line of the program's own, beside the rows: on stderr."""
    print(f"batchinfer: {text}", file=sys.stderr, flush=True)
