"""Scheduler of the engine (C++, csrc/engine): which tokens of which sequences each step computes, in which KV pages."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_Int32 = NDArray[np.int32]
_Int64 = NDArray[np.int64]
_Tokens = NDArray[np.integer] | Sequence[int]

class Finished:
    """A sequence that ended by itself. ``tokens`` int32: all it generated; a stop token that ended it is the last."""

    @property
    def seq_id(self) -> int: ...
    @property
    def reason(self) -> Literal["stop", "length"]: ...
    @property
    def tokens(self) -> _Int32: ...

class Step:
    """What the device computes in one step: T tokens of S sequences, N of which are sampled from.

    The arrays are views, not copies: treat them as read-only. They stay as they are for as long as the Step or one of
    them is referenced, but for ``page_table``. K/V of all T tokens must be written before any of them attends, layer by
    layer, because a sequence may attend to pages that another one fills in the same step.
    """

    @property
    def index(self) -> int:
        """0, 1, 2, ... in the order of :meth:`Scheduler.schedule`."""
    @property
    def num_tokens(self) -> int:
        """T, at most max_step_tokens."""
    @property
    def num_seqs(self) -> int:
        """S, at most max_slots."""
    @property
    def num_samples(self) -> int:
        """N; 0 in a step that holds only the beginning of a prompt."""
    @property
    def num_decode(self) -> int:
        """How many sequences, the leading ones, are past their prompt and have one token, and its draft."""
    @property
    def token_ids(self) -> _Int32:
        """[T]; -1: the token that the sequence's slot sampled in the step before, not yet known to the host."""
    @property
    def positions(self) -> _Int32:
        """[T]; 0-based, within the sequence."""
    @property
    def kv_index(self) -> _Int64:
        """[T]; page * page_size + offset: where the token's K/V goes."""
    @property
    def q_start(self) -> _Int32:
        """[S + 1]; tokens q_start[i] .. q_start[i + 1] - 1 belong to sequence i."""
    @property
    def kv_len(self) -> _Int32:
        """[S]; length of the sequence with this step's tokens, which are its last."""
    @property
    def seq_slot(self) -> _Int32:
        """[S]; row of ``page_table``, the same for as long as the sequence runs."""
    @property
    def seq_ids(self) -> _Int64:
        """[S]"""
    @property
    def sample_row(self) -> _Int32:
        """[N]; index into the T tokens. A sequence with d draft tokens behind its newest one has 1 + d rows, one after
        the other."""
    @property
    def sample_slot(self) -> _Int32:
        """[N]"""
    @property
    def sample_seq(self) -> _Int64:
        """[N]"""
    @property
    def sample_count(self) -> _Int32:
        """[N]; how many tokens the sequence generated before this one, draft tokens among them."""
    @property
    def new_slots(self) -> _Int32:
        """Slots given to a sequence in this step, also to one that comes back after preemption."""
    @property
    def new_seqs(self) -> _Int64:
        """The sequences that got ``new_slots``."""
    @property
    def copy_source(self) -> _Int32:
        """[C], C <= max_slots; pages whose K/V, once that of the step's tokens is in them, and before any token
        attends, goes to pages of other sequences with the same prompt."""
    @property
    def copy_target(self) -> _Int32:
        """[C]; those pages, none twice, and none of them a source."""
    @property
    def page_table(self) -> _Int32:
        """[max_slots, ceil(max_seq_len / page_size)]; the scheduler's own table, the same for all steps: a later
        :meth:`Scheduler.schedule` changes it. Only a row's first ceil(kv_len / page_size) entries have a meaning."""
    @property
    def page_updates(self) -> _Int32:
        """[U, 3]; (slot, column, page) of the entries of ``page_table`` changed for this step, each at most once."""

class Scheduler:
    """Continuous batching over a paged KV cache: chunked prefill beside decode, prefix reuse, admission by predicted
    page use, preemption by recompute. Deterministic; not thread-safe.

    ``lookup``: a decoding sequence also computes up to so many draft tokens, guessed from what followed the same tokens
    before, and samples after each; :meth:`update` takes the sampled tokens up to the first that was not guessed, as if
    they had come one by one. Then no step may be ahead.

    Raises ValueError for a size below 1, max_seq_len below 2, or max_step_tokens below max_slots.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_slots: int,
        max_step_tokens: int,
        max_seq_len: int,
        prefix_cache: bool = True,
        lookup: int = 0,
        _hash_bits: int = 64,
    ) -> None: ...
    def add(
        self,
        seq_id: int,
        prompt: _Tokens,
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        expected_new_tokens: int = 0,
        compute_from: int = 2**31 - 1,
        family: int = 0,
        lookup: bool = True,
        stop_token_ids: _Tokens = (),
        generated: _Tokens = (),
    ) -> None:
        """Queue a sequence. ``max_new_tokens`` is clipped to max_seq_len - len(prompt). A stop token counts from the
        (min_new_tokens + 1)-th generated token on. ``expected_new_tokens`` (0: max_new_tokens) only guides admission;
        a sequence that outlives it is then expected to become twice as long. ``compute_from``: the tokens at this
        position and after it are computed, whatever the prefix cache has of them. ``family``: only sequences of one (0,
        1, 2 ...) share pages. ``lookup``: it may get drafts. ``generated``: tokens that an earlier life of the sequence
        has generated; it goes on after them, and they count as its own.

        Raises ValueError if the id is open, the prompt is empty, too long for one more token, or holds a negative id,
        a number is out of range, ``generated`` is complete already, or prompt and new tokens need more pages than
        there are; TypeError for non-integers.
        """
    def limit_prompts(self, step_tokens: int) -> None:
        """From now on a step takes prompt tokens only up to ``step_tokens`` tokens in all (0: max_step_tokens again);
        its decodes go on, however many they are. ValueError for a negative number."""
    def forget_prefixes(self) -> None:
        """Free the pages that the prefix cache keeps of closed sequences."""
    def tokens_left(self) -> _Int64:
        """How many more tokens each open sequence is taken to generate, int64 [num_open] in no order: what admission
        reckons with."""
    def schedule(self) -> Step | None:
        """The next step, or None if nothing can run now. May be called with one step not yet updated (with drafts,
        with none); RuntimeError otherwise."""
    def update(self, tokens: _Tokens) -> list[Finished]:
        """Tokens sampled by the oldest step not yet updated, in the order of its ``sample_*`` arrays ([] if N is 0).
        Returns the sequences that this ends. A sequence that ended before ignores its token; a preempted one keeps it.

        Raises ValueError, changing nothing, for a wrong number of tokens or a negative one; RuntimeError if every
        step has been updated.
        """
    def finish(self, seq_id: int) -> None:
        """End an open sequence now, waiting or running; tokens still to come are ignored. KeyError if not open."""
    def tokens(self, seq_id: int) -> _Int32:
        """Tokens generated so far by an open sequence (a copy). KeyError if not open."""
    @property
    def num_waiting(self) -> int:
        """Sequences without a slot that still have tokens to compute."""
    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
    @property
    def num_open(self) -> int:
        """Sequences neither returned as Finished nor ended by :meth:`finish`."""
    @property
    def num_steps_ahead(self) -> int:
        """Steps not yet updated: 0, 1 or 2."""
    @property
    def max_steps_ahead(self) -> int:
        """The most that there may be of these: 2, with drafts 1."""
    @property
    def pages_used(self) -> int:
        """Pages that running sequences hold; with cached and free ones, num_pages."""
    @property
    def pages_cached(self) -> int:
        """Pages that nobody holds, kept for their prefix until a page is needed."""
    @property
    def pages_free(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def cached_prompt_tokens(self) -> int:
        """Prompt tokens that were in the cache when their sequence was first admitted; a sum."""
    @property
    def drafted_tokens(self) -> int:
        """Draft tokens that were computed."""
    @property
    def accepted_tokens(self) -> int:
        """Draft tokens that were right: each saved a step of its sequence."""
    def check_integrity(self) -> None:
        """Raise RuntimeError naming the first broken invariant. Slow: for tests."""
