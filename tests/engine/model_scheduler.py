"""What the scheduler's steps must mean, by brute force: a device that remembers what every KV entry was computed from.

:class:`Harness` runs a Scheduler together with that device and checks every step against plain lists of tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchinfer._engine import Finished, Scheduler, Step

VOCABULARY = 3  # few tokens, so that sequences often agree by accident


def next_token(tokens: tuple[int, ...]) -> int:
    """The "model": a fixed function of all tokens before."""
    value = 0x12345
    for token in tokens:
        value = (value ^ (token + 1)) * 0x9E3779B1 % 2**32
        value ^= value >> 15
    return value % VOCABULARY


@dataclass
class Job:
    """One sequence: what it was given and what it must generate."""

    prompt: tuple[int, ...]
    expected: list[int]
    reason: str
    sampled: int = 0  # tokens that steps have sampled
    slot: int | None = None
    arrival: int = 0
    prefilled: bool = False  # the step of its last admission computed all known tokens

    @property
    def history(self) -> tuple[int, ...]:
        return self.prompt + tuple(self.expected)


def make_job(
    prompt: tuple[int, ...], max_new: int, min_new: int, stop: tuple[int, ...], max_seq_len: int, arrival: int
) -> Job:
    tokens = list(prompt)
    generated: list[int] = []
    for index in range(min(max_new, max_seq_len - len(prompt))):
        token = next_token(tuple(tokens))
        tokens.append(token)
        generated.append(token)
        if token in stop and index >= min_new:
            return Job(prompt, generated, "stop", arrival=arrival)
    return Job(prompt, generated, "length", arrival=arrival)


@dataclass
class Harness:
    """A scheduler, its device, and the truth about every open sequence. ``steps_ahead`` 0 or 1."""

    config: dict[str, Any]
    steps_ahead: int = 0
    scheduler: Scheduler = field(init=False)
    jobs: dict[int, Job] = field(default_factory=dict)  # open ones
    done: dict[int, list[int]] = field(default_factory=dict)
    pending: deque[tuple[Step, list[int]]] = field(default_factory=deque)
    prefill_tokens: list[tuple[int, int]] = field(default_factory=list)  # (sequence, tokens) of prompt parts computed
    copied: int = 0  # tokens of prompts taken over from another sequence of the step, in copies of its pages
    drafted: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(**self.config)
        page_size, slots = self.config["page_size"], self.config["max_slots"]
        self.page_size = page_size
        # What each KV entry was computed from: all tokens up to and including its own.
        self.kv: list[tuple[int, ...] | None] = [None] * (self.config["num_pages"] * page_size)
        self.last_token: list[int | None] = [None] * slots
        columns = -(-self.config["max_seq_len"] // page_size)
        self.table = np.full((slots, columns), -1)  # the device's copy, kept by page_updates alone
        self.arrivals = 0

    def add(self, seq_id: int, prompt: tuple[int, ...], max_new: int, min_new: int = 0, expected: int = 0,
            stop: tuple[int, ...] = (), resume: int = 0) -> None:  # fmt: skip
        """``resume``: the sequence has had a life before, and generated so many tokens (all but one at most)."""
        job = make_job(prompt, max_new, min_new, stop, self.config["max_seq_len"], self.arrivals)
        job.sampled = min(resume, len(job.expected) - 1)
        self.scheduler.add(
            seq_id,
            np.array(prompt, np.int32),
            max_new_tokens=max_new,
            min_new_tokens=min_new,
            expected_new_tokens=expected,
            stop_token_ids=np.array(stop, np.int32),
            generated=np.array(job.expected[: job.sampled], np.int32),
        )
        self.jobs[seq_id] = job
        self.arrivals += 1

    def finish(self, seq_id: int) -> None:
        self.scheduler.finish(seq_id)
        del self.jobs[seq_id]

    def advance(self) -> Step | None:
        """One schedule(), and update() for the steps that are no longer ahead."""
        step = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if step is not None:
            tokens = self.run(step)
            self.check(step)
            self.pending.append((step, tokens))
        while len(self.pending) > (self.steps_ahead if step is not None else 0):
            self.update()
        return step

    def update(self) -> list[Finished]:
        _, tokens = self.pending.popleft()
        finished = self.scheduler.update(np.array(tokens, np.int32))
        self.scheduler.check_integrity()
        for ended in finished:
            job = self.jobs.pop(ended.seq_id)
            assert ended.tokens.tolist() == job.expected
            assert ended.reason == job.reason
            self.done[ended.seq_id] = job.expected
        for seq_id, job in self.jobs.items():
            known = self.scheduler.tokens(seq_id).tolist()
            assert known == job.expected[: len(known)]
        return finished

    def drain(self) -> None:
        """Run until nothing is open; a step that computes nothing, or too many steps, fail."""
        bound = 10 * sum(len(job.history) for job in self.jobs.values()) + 10
        steps = 0
        while self.scheduler.num_open or self.pending:
            self.advance()
            steps += 1
            assert steps <= bound, "no progress"
        assert not self.jobs
        assert self.scheduler.pages_used == 0

    def run(self, step: Step) -> list[int]:
        """The device: writes all KV of the step, then samples."""
        for slot, column, page in step.page_updates.tolist():
            self.table[slot, column] = page
        updated = [(slot, column) for slot, column, _ in step.page_updates.tolist()]
        assert len(updated) == len(set(updated))
        histories: list[tuple[int, ...]] = []
        for i in range(step.num_seqs):
            slot = int(step.seq_slot[i])
            spared = self.has_ended(int(step.seq_ids[i]))
            self.copy_pages(step, self.table[slot].tolist())
            for t in range(int(step.q_start[i]), int(step.q_start[i + 1])):
                position, token = int(step.positions[t]), int(step.token_ids[t])
                if token == -1:
                    assert self.steps_ahead
                    token = self.last_token[slot]
                before = self.entry(slot, position - 1) if position else ()
                assert before is not None
                histories.append((*before, token))
                assert step.kv_index[t] == self.where(slot, position)
                self.kv[step.kv_index[t]] = None if spared else histories[-1]
        self.copy_pages(step, step.copy_target.tolist())
        tokens = [next_token(histories[row]) for row in step.sample_row.tolist()]
        for slot, token in zip(step.sample_slot.tolist(), tokens, strict=True):
            self.last_token[slot] = token
        return tokens

    def has_ended(self, seq_id: int) -> bool:
        """Whether the sequence's last token was a stop token, which the host has not seen yet: a device need not
        compute what comes behind it."""
        job = self.jobs[seq_id]
        return job.reason == "stop" and job.sampled == len(job.expected)

    def copy_pages(self, step: Step, targets: list[int]) -> None:
        """Those copies of the step that go to the pages ``targets``."""
        size = self.page_size
        for source, target in zip(step.copy_source.tolist(), step.copy_target.tolist(), strict=True):
            if target in targets:
                self.kv[target * size : (target + 1) * size] = self.kv[source * size : (source + 1) * size]

    def where(self, slot: int, position: int) -> int:
        return int(self.table[slot, position // self.page_size]) * self.page_size + position % self.page_size

    def entry(self, slot: int, position: int) -> tuple[int, ...] | None:
        return self.kv[self.where(slot, position)]

    def check(self, step: Step) -> None:
        scheduler, config = self.scheduler, self.config
        assert 0 < step.num_tokens <= config["max_step_tokens"]
        assert len(step.token_ids) == len(step.positions) == len(step.kv_index) == step.num_tokens
        assert len(step.kv_len) == len(step.seq_slot) == len(step.seq_ids) == step.num_seqs == len(step.q_start) - 1
        assert step.q_start[0] == 0
        assert step.q_start[-1] == step.num_tokens
        assert (np.diff(step.q_start) >= 1).all()
        assert len(set(step.kv_index.tolist())) == step.num_tokens, "two tokens go to one place"
        assert len(set(step.seq_slot.tolist())) == step.num_seqs
        assert scheduler.pages_used + scheduler.pages_cached + scheduler.pages_free == config["num_pages"]

        self.check_copies(step)
        self.check_slots(step)
        ids = step.seq_ids.tolist()
        samples: dict[int, list[tuple[int, int, int]]] = {}
        for n, seq_id in enumerate(step.sample_seq.tolist()):
            row = (int(step.sample_row[n]), int(step.sample_slot[n]), int(step.sample_count[n]))
            samples.setdefault(seq_id, []).append(row)
        for i, seq_id in enumerate(ids):
            first, end = int(step.q_start[i]), int(step.q_start[i + 1])
            length, slot = int(step.kv_len[i]), int(step.seq_slot[i])
            assert step.positions[first:end].tolist() == list(range(length - (end - first), length))
            used = -(-length // self.page_size)
            assert (step.page_table[slot, :used] == self.table[slot, :used]).all()
            job = self.jobs[seq_id]
            assert job.slot == slot, "a running sequence changed its slot"
            decodes = job.prefilled
            assert (i < step.num_decode) == decodes
            drafted = end - first - 1 if decodes else 0
            assert drafted <= config.get("lookup", 0)
            known = len(job.prompt) + job.sampled
            for position in range(length - drafted - self.has_ended(seq_id)):
                assert self.entry(slot, position) == job.history[: position + 1], "attends to foreign tokens"
            job.prefilled = length - drafted == known
            assert (seq_id in samples) == job.prefilled
            if job.prefilled:
                places = [(end - 1 - drafted + k, slot, job.sampled + k) for k in range(drafted + 1)]
                assert samples[seq_id] == places
                draft = step.token_ids[end - drafted : end].tolist()
                wanted = job.expected[job.sampled : job.sampled + drafted]
                right = next((k for k in range(drafted) if draft[k : k + 1] != wanted[k : k + 1]), drafted)
                job.sampled += 1 + right
                self.drafted += drafted
                self.accepted += right
            if not decodes:
                self.prefill_tokens.append((seq_id, end - first))
        self.check_order(step)

    def check_copies(self, step: Step) -> None:
        """A page is copied once, from one that is no copy itself, to a sequence that computes what comes after."""
        sources, targets = step.copy_source.tolist(), step.copy_target.tolist()
        assert len(sources) == len(targets) == len(set(targets)) <= self.config["max_slots"]
        assert not set(sources) & set(targets)
        for slot, first in zip(step.seq_slot.tolist(), step.positions[step.q_start[:-1]].tolist(), strict=True):
            used = range(-(-first // self.page_size))
            starts = [column * self.page_size for column in used if self.table[slot, column] in targets]
            self.copied += sum(min(self.page_size, first - start) for start in starts)

    def check_slots(self, step: Step) -> None:
        """Slots stay; freed ones are given out again lowest first, to sequences in order of arrival."""
        ids = set(step.seq_ids.tolist())
        taken = set()
        for seq_id, job in self.jobs.items():
            if job.slot is not None and seq_id not in ids:
                job.slot, job.prefilled = None, False  # preempted, or its last token was scheduled before
        new = set(step.new_seqs.tolist())
        for seq_id, slot in zip(step.seq_ids.tolist(), step.seq_slot.tolist(), strict=True):
            if seq_id not in new:
                taken.add(slot)
        arrivals = []
        for slot, seq_id in zip(step.new_slots.tolist(), step.new_seqs.tolist(), strict=True):
            assert slot == min(set(range(self.config["max_slots"])) - taken)
            taken.add(slot)
            job = self.jobs[seq_id]
            assert job.slot is None
            job.slot, job.prefilled = slot, False
            arrivals.append(job.arrival)
        assert arrivals == sorted(arrivals)

    def check_order(self, step: Step) -> None:
        """First come, first served: what is in the step arrived before what has tokens left and is not."""
        ids = step.seq_ids.tolist()
        inside = [self.jobs[seq_id] for seq_id in ids]
        arrivals = [job.arrival for job in inside]
        assert arrivals == sorted(arrivals)
        left_out = [j.arrival for seq_id, j in self.jobs.items() if seq_id not in ids and j.sampled < len(j.expected)]
        assert not left_out or arrivals[-1] < min(left_out)
        assert all(job.prefilled for job in inside[:-1]), "only the newest may be in the middle of its prompt"
