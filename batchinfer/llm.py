"""The notebook door: a model, some prompts, their continuations. No files, no MPI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.loading import load_engine
from batchinfer.engine.seeds import mix
from batchinfer.feed import steps
from batchinfer.types import Completion, EngineStats, Request, SamplingParams

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Plain text, token ids, or chat messages with the keys role and content."""


class LLM:
    """An engine in this process.

    >>> llm = LLM("SmolLM2-135M-Instruct.Q4_1.gguf", dtype="fp32")  # doctest: +SKIP
    >>> llm.generate(["The capital of France is"], SamplingParams(max_tokens=8))[0].samples[0].text  # doctest: +SKIP

    ``options`` are the fields of the configuration group ``engine``.
    """

    def __init__(self, model: str, **options: Any):
        config = EngineConfig(**options)
        self._reorder = config.reorder
        self._engine = load_engine(ModelConfig(path=model), config, threads=config.threads)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | None = None, reasoning: bool = False
    ) -> list[Completion]:
        """Continue every prompt; completions in the order of the prompts, a bad prompt's with its ``error`` set.
        ``reasoning``: thoughts between the model's marks for them go to ``Sample.reasoning``."""
        sampling = sampling or SamplingParams()
        return self._run(
            Request(index, sampling.truncated(ids), sampling, seed=mix(mix(sampling.seed) ^ index), reasoning=reasoning)
            for index, ids in enumerate(self._encode(prompts))
        )

    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Completion]:
        """The log-probability of each continuation after its prompt, both as token ids: of the Completion's one sample
        ``logprobs.chosen`` is that of each token, ``logprobs.top_ids`` what greedy decoding would have chosen."""
        return self._run(
            Request(index, np.array([*prompt, *added], np.int32), SamplingParams(), scored_from=len(prompt))
            for index, (prompt, added) in enumerate(zip(prompts, continuations, strict=True))
        )

    def _run(self, requests: Iterable[Request]) -> list[Completion]:
        done = {
            completion.id: completion for step in steps(self._engine, requests, self._reorder) for completion in step
        }
        return [done[index] for index in range(len(done))]

    def stats(self) -> EngineStats:
        """Counters of the engine since it was made."""
        return self._engine.stats()

    def close(self) -> None:
        """Give the weights and the KV cache back."""
        self._engine.close()

    def _encode(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        tokenizer = self._engine.tokenizer
        encoded: list[np.ndarray] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                encoded += tokenizer.encode_batch([prompt])
            elif len(prompt) and isinstance(prompt[0], Mapping):
                encoded += tokenizer.encode_batch([tokenizer.render_chat(list(prompt))], add_special_tokens=False)
            else:
                encoded.append(np.asarray(prompt, np.int32))
        return encoded
