"""Why a request can't run, found before it does. Pure: no scheduler, no device."""

from __future__ import annotations

from collections.abc import Iterable

from batchinfer.types import ErrorCode, Request, RowError, SamplingParams


def refusal(request: Request, max_seq_len: int, vocab_size: int, adapters: int = 0) -> RowError | None:
    """The error of a request that does not fit the engine, or contradicts itself. ``max_seq_len``: of the prompt and
    one more token, which a vector's text has in name only."""
    length = len(request.prompt)
    if length == 0:
        return RowError(ErrorCode.EMPTY_PROMPT, "the prompt has no tokens")
    if length + 1 > max_seq_len:
        reason = f"the prompt has {length} tokens, and engine.max_model_len leaves room for {max_seq_len - 1}"
        return RowError(ErrorCode.PROMPT_TOO_LONG, reason)
    if int(request.prompt.min()) < 0 or int(request.prompt.max()) >= vocab_size:
        return RowError(ErrorCode.BAD_TOKEN_IDS, f"token ids must lie in [0, {vocab_size - 1}]")
    if request.adapter is not None and not 0 <= request.adapter < adapters:
        reason = f"there is no adapter number {request.adapter}: the engine has {adapters}"
        return RowError(ErrorCode.BAD_ADAPTER, reason)
    if request.scored_from is not None and not 1 <= request.scored_from < length:
        reason = f"scored_from={request.scored_from} must lie in [1, {length - 1}]: a token is foretold by others"
        return RowError(ErrorCode.EMPTY_PROMPT, reason)
    try:
        request.sampling.check()
        _check_tokens(request.sampling, vocab_size)
        _check_so_far(request, max_seq_len)
    except ValueError as error:
        return RowError(ErrorCode.BAD_SAMPLING, str(error))
    return None


def _check_tokens(params: SamplingParams, vocab_size: int) -> None:
    """ValueError unless every token that the settings name is one of the model's."""
    named: dict[str, Iterable[int]] = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": params.logit_bias,
        "allowed_token_ids": params.allowed_token_ids,
    }
    for name, ids in named.items():
        for token in ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"{name} names token {token}: the model has the tokens 0 to {vocab_size - 1}")


def _check_so_far(request: Request, max_seq_len: int) -> None:
    """ValueError unless the samples that the request brings along are those of an interrupted one."""
    room = min(request.sampling.max_tokens, max_seq_len - len(request.prompt))
    begun = [sample for sample in request.so_far if not sample.finish_reason]
    if request.so_far and (len(request.so_far) != request.sampling.samples or not begun):
        raise ValueError(f"so_far must hold {request.sampling.samples} samples, and one of them unfinished")
    if any(len(sample.token_ids) >= room for sample in begun):
        raise ValueError(f"so_far holds an unfinished sample that has all of its {room} tokens")
