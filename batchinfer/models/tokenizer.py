"""Text to token ids and back, and chat templates, as the model's files say. No torch.

The work is done by the ``tokenizers`` library (Rust threads, without the GIL). What a folder's JSON files add to
tokenizer.json follows transformers' ``AutoTokenizer``, which is imported only for a folder that has no tokenizer.json.
As there, tokenizer.json alone says whether BOS is put before a text: add_bos_token in tokenizer_config.json is ignored.
"""

from __future__ import annotations

import hashlib
import os
from datetime import datetime
from typing import Any

import numpy as np
import tokenizers

from batchinfer.models.chat import ChatTemplate
from batchinfer.models.files import ModelError, read_json, read_whole
from batchinfer.models.gguf import is_gguf, read_gguf
from batchinfer.models.gguf_tokenizer import build_from_gguf
from batchinfer.models.model_spec import token_ids

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

FOLDER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""What decides how a folder's text becomes tokens and where it stops."""


class Tokenizer:
    """``vocab_size`` is the largest id + 1 (the model's embedding may have more rows); ``eos_ids`` end a text, sorted;
    ``fingerprint`` is a sha256 over the files that decide text -> ids -> text, the template included."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: dict[str, str],
        eos_ids: set[int],
        template: str | None,
        fingerprint: str,
        now: datetime | None = None,
    ):
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id: int | None = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
        eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
        self.eos_ids = tuple(sorted(eos_ids | ({eos} if eos is not None else set())))
        self.has_chat_template = template is not None
        self._chat = ChatTemplate(template, special, now) if template is not None else None
        self.fingerprint = fingerprint

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[np.ndarray]:
        """One int32 array per text. ``add_special_tokens``: what the model puts around a plain text (BOS), which a
        rendered chat has already."""
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [np.array(item.ids, dtype=np.int32) for item in encoded]

    def encode_pairs(self, pairs: list[tuple[str, str]]) -> list[tuple[np.ndarray, int]]:
        """One int32 array per pair of texts, joined as the model wants it, and where the second begins for a model that
        tells them apart (the array's length if it does not)."""
        encoded = self._backend.encode_batch_fast(pairs)
        arrays = [(np.array(item.ids, np.int32), np.array(item.type_ids, np.int32)) for item in encoded]
        return [(ids, len(ids) if not types.any() else int(types.argmax())) for ids, types in arrays]

    def decode_batch(self, ids: list[np.ndarray], skip_special_tokens: bool = True) -> list[str]:
        """Text of each, special tokens left out or not; bytes that are no UTF-8 become U+FFFD."""
        lists = [np.asarray(item).tolist() for item in ids]
        return self._backend.decode_batch(lists, skip_special_tokens=skip_special_tokens)

    def token_id(self, text: str) -> int | None:
        """The token that is this text, special or not; None if there is none."""
        return self._backend.token_to_id(text)

    def to_json(self) -> str:
        """The content of a tokenizer.json that does the same."""
        return self._backend.to_str()

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt for ``messages`` (role, content), ending where the assistant begins; to be encoded with
        ``add_special_tokens=False``. Raises ValueError with the reason."""
        if self._chat is None:
            raise ValueError("the model has no chat template: use a prompt column instead of messages")
        return self._chat.render(messages)


def load_tokenizer(model_path: str, now: datetime | None = None) -> Tokenizer:
    """The tokenizer of a model folder or a GGUF file. Raises ModelError.

    ``now``: the time that a template which prints the date is told (None: the clock).
    """
    if is_gguf(model_path):
        file = read_gguf(model_path)
        backend, special, eos_ids, digest = build_from_gguf(file)
        return _checked(backend, special, eos_ids, file.get("tokenizer.chat_template", str), digest, model_path, now)
    return _from_folder(model_path, now)


def _from_folder(folder: str, now: datetime | None) -> Tokenizer:
    where = os.path.join(folder, "tokenizer_config.json")
    config = read_json(where, required=False)
    if "added_tokens_decoder" not in config:  # the older form
        config |= read_json(os.path.join(folder, "special_tokens_map.json"), required=False)
    special = {name: _content(config[name], where) for name in SPECIAL_NAMES if config.get(name) is not None}
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        backend = _read_backend(path)
        _add_tokens(backend, config, special, where)
        digest = _digest(folder)
    else:
        backend, special = _through_transformers(folder)
        digest = hashlib.sha256((_digest(folder) + backend.to_str()).encode()).hexdigest()
    eos_ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        eos_ids |= set(token_ids(read_json(os.path.join(folder, name), required=False).get("eos_token_id")))
    digest = hashlib.sha256(f"{digest} {sorted(eos_ids)}".encode()).hexdigest()
    return _checked(backend, special, eos_ids, _template(folder, config), digest, folder, now)


def _checked(
    backend: tokenizers.Tokenizer,
    special: dict[str, str],
    eos_ids: set[int],
    template: str | None,
    digest: str,
    where: str,
    now: datetime | None,
) -> Tokenizer:
    try:
        return Tokenizer(backend, special, eos_ids, template, digest, now)
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from None


def _read_backend(path: str) -> tokenizers.Tokenizer:
    data = read_whole(path)
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path} is not a tokenizer that can be read ({error}): copy or download it again") from None


def _content(token: Any, where: str) -> str:
    """A token in a config: a string, or an object with ``content``."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ModelError(f"{where}: {token!r} is no token: it must be a string, or an object with content")
    return text


def _add_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, str], where: str) -> None:
    """Tokens that tokenizer_config.json names and tokenizer.json lacks, in the order of their ids; then named special
    tokens and extra ones that are still unknown."""
    decoder = config.get("added_tokens_decoder") or {}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        tokens = [decoder[key] for key in sorted(decoder, key=int)]
        backend.add_tokens(
            [tokenizers.AddedToken(t["content"], **{name: t[name] for name in flags if name in t}) for t in tokens]
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{where}: added_tokens_decoder must map ids to objects with content ({error!r})") from None
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(extra, list):
        raise ModelError(f"{where}: extra_special_tokens must be a list or an object, not {extra!r}")
    named = [*special.values(), *(_content(token, where) for token in extra)]
    missing = [token for token in dict.fromkeys(named) if token not in known]
    backend.add_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in missing])


def _template(folder: str, config: dict[str, Any]) -> str | None:
    """The chat template: its own file before the one in tokenizer_config.json, as transformers has it."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        try:
            return read_whole(path).decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{path} cannot be read: {error}") from None
    found = read_json(os.path.join(folder, "chat_template.json"), required=False).get("chat_template")
    found = found or config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = [entry for entry in found if isinstance(entry, dict)]
        found = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise ModelError(f"{folder}: chat_template must be a string or a list of named templates")
    return found


def _digest(folder: str) -> str:
    digest = hashlib.sha256()
    for name in FOLDER_FILES:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            data = read_whole(path)
            digest.update(f"{name}\n{len(data)}\n".encode() + data)
    return digest.hexdigest()


def _through_transformers(folder: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """For a folder with older vocabulary files alone (vocab.json and merges.txt, tokenizer.model)."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # whatever went wrong in there, the remedy is the same
        raise ModelError(
            f"{folder} has no tokenizer.json, and its other tokenizer files cannot be converted ({error}): copy the "
            "whole model, or save the tokenizer once with transformers (AutoTokenizer ... save_pretrained)"
        ) from None
    special = {name: str(getattr(tokenizer, name)) for name in SPECIAL_NAMES if getattr(tokenizer, name, None)}
    return backend, special
