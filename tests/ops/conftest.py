"""Hypothesis for the ops: fewer examples, since each is many numbers."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("ops", max_examples=40)
settings.load_profile("ops")
