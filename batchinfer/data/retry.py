"""The good rows of an earlier output, taken over as they are: what is left to compute is its error rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchinfer.data.ledger import Ledger
from batchinfer.data.part import read_part
from batchinfer.data.plan import Plan, difference_table, differences
from batchinfer.data.results import ResultOptions, generated_columns
from batchinfer.types import Chunk, Completion, ExitCode, JobError, Logprobs, Sample

_LOGPROBS = {"chosen": np.float32, "top_ids": np.int32, "top": np.float32}


class EarlierOutput:
    """A complete job over the same input, whose generated columns are those of the new one."""

    def __init__(self, path: str, options: ResultOptions):
        """JobError(73): ``path`` is no output folder; (75): its job is not complete."""
        self._ledger = Ledger.attach(path)
        self._options = options
        if self._ledger.success() is None:
            raise JobError(
                f"input.retry_errors_of={path}: that job is not complete, go on with it", ExitCode.INCOMPLETE
            )

    @property
    def plan(self) -> Plan:
        return self._ledger.plan

    def check(self, plan: Plan) -> None:
        """JobError(65) unless ``plan`` has the same rows in the same chunks."""
        same_settings = Plan(plan.files, plan.chunks, plan.rows_per_chunk, self.plan.fingerprint)
        found = differences(self.plan, same_settings)
        if found:
            text = f"input.retry_errors_of={self._ledger.path} had another input:\n{difference_table(found)}"
            raise JobError(text, ExitCode.MISMATCH)
        if _pieces(self.plan) != _pieces(plan):
            text = "has its input files in another order, since some were added to it later: run the job anew"
            raise JobError(f"input.retry_errors_of={self._ledger.path} {text}", ExitCode.MISMATCH)

    def good_rows(self, chunk: Chunk) -> dict[int, Completion]:
        """The chunk's rows that had no error, by row id. JobError(74): the part is damaged; (64): it lacks a generated
        column of the new job."""
        _, table = read_part(self._ledger.path, self.plan, chunk)
        columns = {column.name: column.type for column in generated_columns(self._options)}
        for name, kind in columns.items():
            if name not in table.column_names or table.schema.field(name).type != kind:
                is_ = table.schema.field(name).type if name in table.column_names else "absent"
                raise JobError(
                    f"column {name!r} must be {kind} and is {is_} in {self._ledger.path}: rows are taken over from an "
                    "output with the same output.prefix, output.token_ids, output.reasoning, sampling.n and logprobs",
                    ExitCode.USAGE,
                )
        prefix = self._options.prefix
        rows = table.select(list(columns)).to_pylist()
        found = {}
        for offset, row in enumerate(rows):
            values = {name.removeprefix(prefix): value for name, value in row.items()}
            if values["status"] == "ok":
                found[chunk.row_id(offset)] = self._completion(chunk.row_id(offset), values)
        return found

    def _completion(self, row: int, values: dict[str, Any]) -> Completion:
        names = ("generated_text", "finish_reason", "completion_tokens", "token_ids", "logprobs", "reasoning")
        columns = {name: values[name] if self._options.many else [values[name]] for name in names if name in values}
        each = [dict(zip(columns, of_sample, strict=True)) for of_sample in zip(*columns.values(), strict=True)]
        samples, of_prompt = tuple(_sample(value) for value in each), _logprobs(values.get("prompt_logprobs"))
        return Completion(row, values["prompt_tokens"], samples, prompt_logprobs=of_prompt)


def _pieces(plan: Plan) -> list[tuple[str, int, int]]:
    return [(plan.files[chunk.file].path, chunk.start, chunk.rows) for chunk in plan.chunks]


def _sample(value: dict[str, Any]) -> Sample:
    """Without a column of token ids only their number is known, and nothing else is written of them."""
    ids = value.get("token_ids")
    tokens = np.zeros(value["completion_tokens"], np.int32) if ids is None else np.array(ids, np.int32)
    logprobs = _logprobs(value.get("logprobs"))
    return Sample(tokens, value["generated_text"], value["finish_reason"], logprobs, value.get("reasoning"))


def _logprobs(value: dict[str, Any] | None) -> Logprobs | None:
    return None if value is None else Logprobs(*(np.array(value[name], kind) for name, kind in _LOGPROBS.items()))
