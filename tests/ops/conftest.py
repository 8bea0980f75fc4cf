"""Hypothesis for the ops: examples touch threads, whose wake-ups on a busy machine say nothing about a test."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("ops", deadline=None, max_examples=40)
settings.load_profile("ops")
