"""The notebook door: a model, some prompts, their continuations. No files, no MPI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchinfer.config import Config, EmbedConfig, EngineConfig, ModelConfig, TaskConfig
from batchinfer.engine.loading import load_engine
from batchinfer.engine.seeds import mix
from batchinfer.feed import steps
from batchinfer.models.pool_spec import pool_spec
from batchinfer.rules import check
from batchinfer.types import Completion, EngineStats, Request, SamplingParams

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Plain text, token ids, or chat messages with the keys role and content."""


class LLM:
    """An engine in this process.

    >>> llm = LLM("SmolLM2-135M-Instruct.Q4_1.gguf", dtype="fp32")  # doctest: +SKIP
    >>> llm.generate(["The capital of France is"], SamplingParams(max_tokens=8))[0].samples[0].text  # doctest: +SKIP

    ``options`` are the fields of the configuration group ``engine``. With ``task`` "embed" or "classify" it makes
    vectors of texts, and generates nothing; ``embed`` says which. ``adapters``: names of LoRA adapters and their
    folders.
    """

    def __init__(
        self,
        model: str,
        task: str = "generate",
        embed: EmbedConfig | None = None,
        adapters: Mapping[str, str] | None = None,
        **options: Any,
    ):
        config = EngineConfig(**options)
        self._reorder = config.reorder
        self._adapters = sorted(adapters or {})
        named = ModelConfig(path=model, adapters=dict(adapters or {}))
        whole = Config(TaskConfig(task), named, embed=embed or EmbedConfig(), engine=config)
        check(replace(whole, model=ModelConfig(path=model)), required=("model.path",))
        self._engine = load_engine(whole.model, config, threads=config.threads, pool=pool_spec(whole))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        reasoning: bool = False,
        adapter: str | None = None,
    ) -> list[Completion]:
        """Continue every prompt; completions in the order of the prompts, a bad prompt's with its ``error`` set.
        ``reasoning``: thoughts between the model's marks for them go to ``Sample.reasoning``. ``adapter``: the name of
        the one that they go through; ValueError if there is none of this name."""
        sampling, number = sampling or SamplingParams(), None if adapter is None else self._adapters.index(adapter)
        return self._run(
            Request(
                index,
                sampling.truncated(ids),
                sampling,
                seed=mix(mix(sampling.seed) ^ index),
                adapter=number,
                reasoning=reasoning,
            )
            for index, ids in enumerate(self._encode(prompts))
        )

    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Completion]:
        """The log-probability of each continuation after its prompt, both as token ids: of the Completion's one sample
        ``logprobs.chosen`` is that of each token, ``logprobs.top_ids`` what greedy decoding would have chosen."""
        return self._run(
            Request(index, np.array([*prompt, *added], np.int32), SamplingParams(), scored_from=len(prompt))
            for index, (prompt, added) in enumerate(zip(prompts, continuations, strict=True))
        )

    def vectors(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """What the model makes of every prompt: of the Completion's one sample ``vector`` float32 is the embedding, or
        the probabilities of the classes in the order of the model's ``id2label``. An LLM of the task embed or
        classify."""
        return self._run(Request(index, ids, SamplingParams()) for index, ids in enumerate(self._encode(prompts)))

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
