"""The notebook door: a model, some prompts, their continuations. No files, no MPI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from batchinfer.arguments import Prompt, engine_config, sampling_params, scored_ids, several, token_ids
from batchinfer.config import Config, EmbedConfig, ModelConfig, TaskConfig
from batchinfer.engine.loading import load_engine
from batchinfer.engine.seeds import mix
from batchinfer.feed import steps
from batchinfer.models.pool_spec import pool_spec
from batchinfer.rules import check
from batchinfer.types import Completion, EngineStats, Request, SamplingParams


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
        config = engine_config(options)
        self._reorder = config.reorder
        self._adapters = sorted(adapters or {})
        named = ModelConfig(path=model, adapters=dict(adapters or {}))
        whole = Config(TaskConfig(task), named, embed=embed or EmbedConfig(), engine=config)
        check(replace(whole, model=ModelConfig(path=model)), required=("model.path",))
        self._engine = load_engine(whole.model, config, threads=config.threads, pool=pool_spec(whole))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        reasoning: bool = False,
        adapter: str | None = None,
    ) -> list[Completion]:
        """Continue every prompt; completions in the order of the prompts, one with ``error`` set for a prompt that the
        engine can't take (too long, no tokens). ``sampling``: of all, or one for each. ``reasoning``: thoughts between
        the model's marks for them go to ``Sample.reasoning``. ``adapter``: the name of the one that they go through.
        TypeError and ValueError name the argument that is wrong."""
        prompts, number = several(prompts), self._adapter(adapter)
        given = [sampling or SamplingParams()] if isinstance(sampling, SamplingParams | None) else list(sampling)
        params = [sampling_params(one) for one in given]
        if isinstance(sampling, SamplingParams | None):
            params *= len(prompts)
        if len(params) != len(prompts):
            raise ValueError(
                f"there are {len(prompts)} prompts and {len(params)} sampling parameters: give one for all"
            )
        encoded = token_ids(prompts, self._engine.tokenizer)
        return self._run(
            Request(
                index,
                one.truncated(ids),
                one,
                seed=mix(mix(one.seed) ^ index),
                adapter=number,
                reasoning=reasoning,
            )
            for index, (ids, one) in enumerate(zip(encoded, params, strict=True))
        )

    def score(
        self, prompts: Prompt | Sequence[Prompt], continuations: str | Sequence[str] | Sequence[Sequence[int]]
    ) -> list[Completion]:
        """The log-probability of each continuation, a text or token ids, after its prompt: of the Completion's one
        sample ``logprobs.chosen`` is that of each token, ``logprobs.top_ids`` what greedy decoding would have
        chosen. A text is tokenised with its prompt's, as in a job of task=score; one of token ids comes behind any
        prompt's tokens."""
        before, added = several(prompts), several(continuations)
        if len(before) != len(added):
            raise ValueError(f"there are {len(before)} prompts and {len(added)} continuations: each prompt needs one")
        wholes, starts = scored_ids(before, added, self._engine.tokenizer)
        return self._run(
            Request(index, whole, SamplingParams(), scored_from=start)
            for index, (whole, start) in enumerate(zip(wholes, starts, strict=True))
        )

    def vectors(self, prompts: Prompt | Sequence[Prompt]) -> list[Completion]:
        """What the model makes of every prompt: of the Completion's one sample ``vector`` float32 is the embedding, or
        the probabilities of the classes in the order of the model's ``id2label``. An LLM of the task embed or
        classify."""
        encoded = token_ids(several(prompts), self._engine.tokenizer)
        return self._run(Request(index, ids, SamplingParams()) for index, ids in enumerate(encoded))

    def _run(self, requests: Iterable[Request]) -> list[Completion]:
        """All of them, or none: what an exception, Ctrl-C in a notebook say, leaves open is dropped."""
        asked, done = list(requests), {}
        try:
            for step in steps(self._engine, asked, self._reorder):
                done |= {completion.id: completion for completion in step}
        except BaseException:
            for request in asked:
                with suppress(KeyError):
                    self._engine.abandon(request.id)
            with suppress(Exception):  # where the engine itself is broken, the first error tells more
                self._engine.step()  # lets those go that were refused
            raise
        return [done[index] for index in range(len(done))]

    def _adapter(self, name: str | None) -> int | None:
        if name is None:
            return None
        if name not in self._adapters:
            known = ", ".join(self._adapters) or "none: give LLM(..., adapters={name: folder})"
            raise ValueError(f"there is no adapter {name!r}; there are {known}")
        return self._adapters.index(name)

    def stats(self) -> EngineStats:
        """Counters of the engine since it was made."""
        return self._engine.stats()

    def close(self) -> None:
        """Give the weights and the KV cache back."""
        self._engine.close()
