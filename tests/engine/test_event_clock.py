"""From a device's events to the host's clock, without a device."""

from __future__ import annotations

import numpy as np
import pytest

from batchinfer.engine.device_runner import EventClock


class Event:
    """Passed ``at`` milliseconds after the device was switched on; distances have the precision of a float32."""

    def __init__(self, at: float):
        self.at = at

    def elapsed_time(self, later: Event) -> float:
        return float(np.float32(later.at - self.at))


def test_times_are_counted_on_from_event_to_event() -> None:
    clock = EventClock(Event(500.0), time=100.0)  # type: ignore[arg-type]
    assert clock.advance(Event(501.5)) == pytest.approx(100.0015)  # type: ignore[arg-type]
    assert clock.advance(Event(502.0)) == pytest.approx(100.002)  # type: ignore[arg-type]


def test_after_an_hour_of_steps_the_clock_is_right_to_a_millisecond() -> None:
    """One event for all distances would have steps of 0.25 ms by then, and a day later of 8 ms."""
    step, count = 12.345678, 300_000
    clock = EventClock(Event(0.0))  # type: ignore[arg-type]
    for number in range(1, count + 1):
        last = clock.advance(Event(number * step))  # type: ignore[arg-type]
    assert last == pytest.approx(step * count / 1000, abs=1e-3)
