"""Counters -> the progress line and the closing summary."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TextIO

from batchinfer.types import Completion, EngineStats, StepWork

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
    :func:`stages`. ``shared_prompt_tokens``: what rows that were ordered together have in common; 0 where
    none were. ``host_bytes``, ``device_bytes``: most memory in use, of several ranks the largest."""

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    running: int = 0
    pages_used: int = 0
    pages_total: int = 0
    cached_prompt_tokens: int = 0
    needed_prompt_tokens: int = 0
    shared_prompt_tokens: int = 0
    pages_peak: int = 0
    preemptions: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prefill: StepWork = field(default_factory=StepWork)
    decode: StepWork = field(default_factory=StepWork)
    device_idle: float = 0.0
    host_bytes: int = 0
    device_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: Counters) -> Counters:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "seconds"}
        sums |= {name: max(getattr(self, name), getattr(other, name)) for name in ("host_bytes", "device_bytes")}
        names = [*self.seconds, *(name for name in other.seconds if name not in self.seconds)]
        return Counters(**sums, seconds={n: self.seconds.get(n, 0.0) + other.seconds.get(n, 0.0) for n in names})


def total(reports: Iterable[Counters | None]) -> Counters:
    """Sum over ranks; None stands for a rank that has not reported yet."""
    return sum((report for report in reports if report is not None), Counters())


class Meter:
    """Counts what comes out of one rank's engine. ``stats`` is the engine's method of that name, ``seconds`` tells the
    times of the stages around it, ``shared`` what prompts have in common."""

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        seconds: Callable[[], Mapping[str, float]] = dict,
        shared: Callable[[], int] = int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stats, self._seconds, self._shared, self._clock = stats, seconds, shared, clock
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
                needed_prompt_tokens=stats.needed_prompt_tokens,
                shared_prompt_tokens=self._shared(),
                pages_peak=stats.pages_peak,
                preemptions=stats.preemptions,
                steps=stats.steps,
                drafted_tokens=stats.drafted_tokens,
                accepted_tokens=stats.accepted_tokens,
                prefill=replace(stats.prefill),
                decode=replace(stats.decode),
                device_idle=stats.device_idle,
                host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                device_bytes=stats.device_bytes,
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


def summary(
    counts: Mapping[str, int],
    attempt: Counters,
    times: Mapping[str, float],
    ranks: int,
    output: str,
    shares: tuple[float, float] | None = None,
) -> str:
    """The closing lines. ``counts`` are the whole job's (keys ok, error, error:CODE, prompt_tokens,
    completion_tokens), ``attempt`` and ``times`` this attempt's: "seconds" in all, and "computing_seconds" without
    the loading of the model, to which the rate refers. ``shares`` as in :func:`stages`."""
    codes = {key.partition(":")[2]: n for key, n in sorted(counts.items()) if key.startswith("error:")}
    errors = f" ({', '.join(f'{code} {n:,}' for code, n in codes.items())})" if codes else ""
    rate = attempt.output_tokens / max(times["computing_seconds"], 1e-9)
    took = f"{duration(times['seconds'])} on {ranks} rank{'s' if ranks > 1 else ''}"
    return "\n".join(
        [
            f"rows       {counts['ok'] + counts['error']:,}: {counts['ok']:,} ok, {counts['error']:,} failed{errors}",
            f"tokens     {counts['prompt_tokens']:,} prompt, {counts['completion_tokens']:,} output",
            f"this run   {attempt.rows:,} rows in {took}, {rate:,.1f} output tok/s after loading",
            *stages(attempt, times["computing_seconds"] * ranks, shares),
            f"output     {output}",
        ]
    )


def stages(attempt: Counters, seconds: float, roofline: tuple[float, float] | None = None) -> list[str]:
    """Lines on who waited for whom, in shares of ``seconds`` of computing, all ranks together; none if no step was
    computed. "waited": for what the engine had to wait while it could have taken more rows, the end of the job, when
    there are none, included; "backlog": for the writer. "worked": what threads did beside the engine, and the engine's
    own parts. "device": its time by kind of step; ``roofline``: the shares of prefill's and decode's that no device
    could have saved."""
    if not attempt.steps:
        return []

    def shares(names: Iterable[str]) -> str:
        return ", ".join(f"{n} {attempt.seconds[n] / max(seconds, 1e-9):.1%}" for n in names if n in attempt.seconds)

    needed = max(attempt.needed_prompt_tokens, 1)
    found = f"{attempt.cached_prompt_tokens / needed:.1%} of the prompt tokens found"
    if attempt.shared_prompt_tokens:
        found += f" ({attempt.shared_prompt_tokens / needed:.1%} shared by rows in hand together)"
    peak = attempt.pages_peak / max(attempt.pages_total, 1)
    drafts = []
    if attempt.drafted_tokens:
        right = attempt.accepted_tokens / attempt.drafted_tokens
        each = attempt.output_tokens / max(attempt.output_tokens - attempt.accepted_tokens, 1)
        drafts = [
            f"drafts     {right:.1%} of {attempt.drafted_tokens:,} tokens right, {each:.2f} tokens a sample and step"
        ]
    on_device = f", {attempt.device_bytes / 1e9:.1f} GB of a GPU" if attempt.device_bytes else ""
    own = [name for name in attempt.seconds if name not in (*WAITS, *BESIDE)]
    return [
        f"waited     {shares(WAITS)}",
        f"worked     {shares(BESIDE)}; engine: {shares(own)}",
        f"device     {_device(attempt, roofline)}",
        f"memory     {attempt.host_bytes / 1e9:.1f} GB of a host{on_device} at most in a rank",
        f"cache      {found}, {peak:.0%} of the KV pages used at most, "
        f"{attempt.preemptions:,} preemptions in {attempt.steps:,} steps",
        *drafts,
    ]


def _device(attempt: Counters, roofline: tuple[float, float] | None) -> str:
    """prefill 5 steps, 8,192 tokens/s, 61.0% of the roofline; decode ...; 0.4% idle. A prefill step has prompt tokens
    among others."""
    parts = []
    busy = attempt.prefill.seconds + attempt.decode.seconds
    for i, (kind, work) in enumerate((("prefill", attempt.prefill), ("decode", attempt.decode))):
        if not work.steps:
            continue
        share = f", {roofline[i]:.1%} of the roofline" if roofline else ""
        rate = work.tokens / max(work.seconds, 1e-9)
        parts.append(
            f"{kind} {work.steps:,} steps of {1000 * work.seconds / work.steps:,.1f} ms, {rate:,.0f} tok/s{share}"
        )
    return "; ".join([*parts, f"{attempt.device_idle / max(busy + attempt.device_idle, 1e-9):.1%} idle"])


def say(text: str) -> None:
    """A line of the program's own, beside the rows: on stderr."""
    print(f"batchinfer: {text}", file=sys.stderr, flush=True)
