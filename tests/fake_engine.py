"""An engine that maps a prompt to a known answer: for tests of everything around an engine."""

from __future__ import annotations

import hashlib
from collections import deque

import numpy as np

from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.types import Completion, EngineStats, ErrorCode, Logprobs, PoolSpec, Request, RowError, Sample

POISON = "poison"
"""A prompt with this word is refused by the engine."""


class ByteTokenizer:
    """One token per UTF-8 byte."""

    vocab_size = 256
    fingerprint = "bytes"

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def encode_pairs(self, pairs: list[tuple[str, str]]) -> list[tuple[np.ndarray, int]]:
        joined = self.encode_batch([f"{query}|{document}" for query, document in pairs])
        return [(ids, len(query.encode()) + 1) for ids, (query, _) in zip(joined, pairs, strict=True)]

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def answer(prompt: np.ndarray, seed: int, sample: int, max_tokens: int) -> np.ndarray:
    """Tokens (int32) that depend on prompt, seed and sample index alone, as those of a real engine must."""
    digest = hashlib.sha256(prompt.astype("<i4").tobytes() + seed.to_bytes(8, "little") + bytes([sample])).digest()
    return (np.frombuffer(digest, np.uint8)[: min(max_tokens, 1 + digest[0] % 16)] % 26 + ord("a")).astype(np.int32)


class FakeEngine:
    """Every request takes as many steps as its first sample has tokens, ``slots`` of them at a time.

    ``fail_at_step``: raise there, as a device that goes away would.
    """

    def __init__(
        self, slots: int = 8, max_seq_len: int = 256, fail_at_step: int | None = None, pool: PoolSpec | None = None
    ):
        self._pool = pool
        self.tokenizer = ByteTokenizer()
        self.max_seq_len = max_seq_len
        self.max_slots, self.kv_tokens = slots, slots * max_seq_len
        self.flat_steps = True
        self.closed = False
        self._slots, self._fail_at_step = slots, fail_at_step
        self._waiting: deque[Request] = deque()
        self._running: list[list] = []  # [steps left, completion]
        self._stats = EngineStats(pages_total=slots)
        self.most_open = 0
        self.added = 0
        self.resumed = 0  # of them, those that brought tokens along

    @property
    def num_open(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def wants_more(self) -> bool:
        return self.num_open < 2 * self._slots

    def expected_tokens(self, request: Request) -> int:
        return request.sampling.max_tokens

    @property
    def num_running(self) -> int:
        return len(self._running)

    def tokens_left(self) -> np.ndarray:
        return np.ones(self.num_open, np.int64)

    def limit_prompts(self, step_tokens: int) -> None:
        pass

    def add(self, request: Request) -> None:
        self._waiting.append(request)
        self.added += 1
        self._stats.prompt_tokens += len(request.prompt)
        self.most_open = max(self.most_open, self.num_open)

    def step(self) -> list[Completion]:
        if not self.num_open:
            return []
        self._stats.steps += 1
        if self._stats.steps == self._fail_at_step:
            raise RuntimeError("the device went away")
        while self._waiting and len(self._running) < self._slots:
            request = self._waiting.popleft()
            completion = self._complete(request)
            steps = max((len(s.token_ids) for s in completion.samples), default=1) or 1  # a vector takes one too
            self._running.append([steps - self._known_tokens(request, completion), completion])
        for entry in self._running:
            entry[0] -= 1
            self._stats.output_tokens += len(entry[1].samples)
        done = [completion for left, completion in self._running if left == 0]
        self._running = [entry for entry in self._running if entry[0] > 0]
        return done

    def unfinished(self) -> list[Completion]:
        """Of each running request the tokens of the steps so far."""
        states = []
        for left, completion in self._running:
            longest = max((len(s.token_ids) for s in completion.samples), default=0)
            known = longest - left
            samples = [
                s if len(s.token_ids) <= known else Sample(s.token_ids[:known], "", "") for s in completion.samples
            ]
            if any(len(s.token_ids) for s in samples):
                states.append(Completion(completion.id, completion.prompt_tokens, tuple(samples)))
        return states

    def abandon(self, request_id: int) -> Completion:
        state = {c.id: c for c in self.unfinished()}.get(request_id, Completion(request_id, 0))
        self._running = [entry for entry in self._running if entry[1].id != request_id]
        self._waiting = deque(request for request in self._waiting if request.id != request_id)
        return state

    def stats(self) -> EngineStats:
        self._stats.running, self._stats.waiting = len(self._running), len(self._waiting)
        self._stats.pages_used = len(self._running)
        return self._stats

    def close(self) -> None:
        self.closed = True

    def _known_tokens(self, request: Request, completion: Completion) -> int:
        """Tokens of the longest sample that the request brings along; they must be those that it would get here."""
        for before, sample in zip(request.so_far, completion.samples, strict=bool(request.so_far)):
            assert before.token_ids.tolist() == sample.token_ids[: len(before.token_ids)].tolist()
        self.resumed += bool(request.so_far)
        return max((len(s.token_ids) for s in request.so_far), default=0)

    def _complete(self, request: Request) -> Completion:
        if POISON.encode() in bytes(request.prompt.astype(np.uint8)):
            error = RowError(ErrorCode.KV_CAPACITY, "no page for this one")
            return Completion(request.id, len(request.prompt), error=error)
        if self._pool is not None:
            vector = np.resize(request.prompt, self._pool.width).astype(np.float32) / 256
            return Completion(
                request.id, len(request.prompt), (Sample(request.prompt[:0], "", "pooled", vector=vector),)
            )
        if request.scored_from is not None:
            tokens = request.prompt[request.scored_from :]
            logprobs = Logprobs(-tokens.astype(np.float32) / 100, tokens[:, None], -tokens[:, None].astype(np.float32))
            return Completion(request.id, request.scored_from, (Sample(tokens, "", "scored", logprobs),))
        samples = []
        for index in range(request.sampling.n):
            tokens = answer(request.prompt, request.seed, index, request.sampling.max_tokens)
            samples.append(Sample(tokens, bytes(tokens.astype(np.uint8)).decode(), "stop"))
        return Completion(request.id, len(request.prompt), tuple(samples))


def load_fake(
    model: ModelConfig,
    engine: EngineConfig,
    *,
    threads: int,
    rank_on_node: int,
    ranks_on_node: int,
    source: object,
    pool: PoolSpec | None,
) -> FakeEngine:
    return FakeEngine(slots=engine.max_slots, pool=pool)


def identify_fake(model_path: str) -> dict[str, str]:
    return {"weights": hashlib.sha256(model_path.encode()).hexdigest()}
