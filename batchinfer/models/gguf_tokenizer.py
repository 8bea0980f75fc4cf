"""The tokenizer that a GGUF file describes in its metadata, built from the parts of the ``tokenizers`` library.

GGUF names the rule that splits text before merging (``tokenizer.ggml.pre``) but does not carry it: ``SPLITS`` holds
the rules of the models themselves. An unknown name is an error, since a near miss gives other tokens in a few texts
of a hundred and no message.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing

from batchinfer.models.files import ModelError
from batchinfer.models.gguf import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""``tokenizer.ggml.token_type``."""

SPECIAL_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS_LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """How a byte-level vocabulary cuts text: digits one by one first, then by each pattern in turn.

    ``nfc``: the text is normalised. ``whole_words``: a piece that is a token is taken before any merging.
    ``bos``: BOS is put before a text unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False


LLAMA3 = Split((rf"{CONTRACTIONS}|{WORDS_LLAMA3}|\p{{N}}{{1,3}}|{PUNCTUATION}|{BLANKS}",), whole_words=True, bos=True)
QWEN2 = Split((rf"{CONTRACTIONS}|{WORDS_LLAMA3}|\p{{N}}|{PUNCTUATION}|{BLANKS}",), nfc=True)
TEKKEN = Split((rf"{WORDS_TEKKEN}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}",), whole_words=True, bos=True)

SPLITS = {
    "gpt-2": Split((GPT2,)),
    "smollm": Split((GPT2,), digits=True),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": TEKKEN,
    # Files from before the key existed (early 2024): llama.cpp's own fallback, of no model in particular.
    "default": Split((r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}


def build_from_gguf(file: GgufFile) -> tuple[Tokenizer, dict[str, str], set[int], str]:
    """(tokenizer, named special tokens, ids that end a text, sha256 of the metadata used). Raises ModelError."""
    kind = file.get("tokenizer.ggml.model", str, required=True)
    tokens = _strings(file, "tokenizer.ggml.tokens")
    if kind == "gpt2":
        backend, bos = _byte_level(file, tokens)
    elif kind == "llama":
        backend, bos = _sentencepiece(file, tokens), True
    else:
        raise ModelError(
            f"{file.path}: tokenizer.ggml.model={kind!r} is not supported; supported are gpt2 and llama. A Hugging "
            "Face folder of the model works with any tokenizer.json"
        )
    _add_special(file, backend, tokens)
    special = {name: tokens[i] for name, key in SPECIAL_KEYS.items() if (i := _token_id(file, key, tokens)) is not None}
    surround(
        backend,
        special.get("bos_token") if file.get("tokenizer.ggml.add_bos_token", bool, bos) else None,
        special.get("eos_token") if file.get("tokenizer.ggml.add_eos_token", bool, False) else None,
        file.path,
    )
    ends = {i for key in END_KEYS if (i := _token_id(file, key, tokens)) is not None}
    digest = hashlib.sha256()
    for key in sorted(file.metadata):
        if key.startswith("tokenizer."):
            digest.update(f"{key}={file.metadata[key]!r}\n".encode())
    return backend, special, ends, digest.hexdigest()


def _byte_level(file: GgufFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE (Radford et al. 2019, GPT-2) and whether it puts BOS before a text."""
    name = file.get("tokenizer.ggml.pre", str, "default")
    if name not in SPLITS:
        raise ModelError(
            f"{file.path}: the pre-tokenizer tokenizer.ggml.pre={name!r} is not known; known are {', '.join(SPLITS)}. "
            "A Hugging Face folder of the model works with any tokenizer.json"
        )
    split = SPLITS[name]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(file, "tokenizer.ggml.merges")]
    bad = next(
        (m for m in merges if len(m) != 2 or m[0] not in vocab or m[1] not in vocab or m[0] + m[1] not in vocab), None
    )
    if bad:
        raise ModelError(f"{file.path}: tokenizer.ggml.merges holds {' '.join(bad)!r}, which is not made of its tokens")
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_words))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    steps = [pre.Digits(individual_digits=True)] if split.digits else []
    steps += [pre.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    backend.pre_tokenizer = pre.Sequence([*steps, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend, split.bos


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE (Kudo & Richardson 2018): a piece's score is the priority of the merge that makes it; unknown
    characters fall back to bytes."""
    scores = file.get("tokenizer.ggml.scores", list, required=True)
    types = file.get("tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
    if len(scores) != len(tokens) or len(types) != len(tokens):
        raise ModelError(f"{file.path}: tokenizer.ggml.tokens, .scores and .token_type must be of equal length")
    vocab = {token: i for i, token in enumerate(tokens)}
    mergeable = {token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, UNUSED)}
    ranked = []
    for token in mergeable:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[vocab[token]], vocab[token], cut, left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = _token_id(file, "tokenizer.ggml.unknown_token_id", tokens)
    model = models.BPE(vocab=vocab, merges=merges, unk_token=tokens[unknown or 0], fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    trim = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *trim])
    return backend


def _add_special(file: GgufFile, backend: Tokenizer, tokens: list[str]) -> None:
    """Control tokens (never text) and user-defined ones (text) are matched before anything else."""
    types = file.get("tokenizer.ggml.token_type", list, [])
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [token for token, its in zip(tokens, types, strict=False) if its == kind]
        backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in found])


def _strings(file: GgufFile, key: str) -> list[str]:
    value = file.get(key, list, required=True)
    if not all(isinstance(item, str) for item in value):
        raise ModelError(f"{file.path}: metadata key {key!r} must be a list of strings")
    return value


def _token_id(file: GgufFile, key: str, tokens: list[str]) -> int | None:
    value = file.get(key, int)
    if value is not None and not 0 <= value < len(tokens):
        raise ModelError(f"{file.path}: {key}={value} is outside the vocabulary of {len(tokens)}")
    return value


def surround(backend: Tokenizer, bos: str | None, eos: str | None, where: str) -> None:
    """Put ``bos`` before and ``eos`` behind every plain text; None: nothing."""
    tokens = []
    for name, token in (("BOS", bos), ("EOS", eos)):  # templates are split at blanks and colons, which tokens may hold
        number = backend.token_to_id(token) if token else None
        if token and number is None:
            raise ModelError(f"{where}: the special token {token!r} is not in the vocabulary")
        if token:
            tokens.append({"id": name, "ids": [number], "tokens": [token]})
    single = ["BOS:0"] * bool(bos) + ["$A:0"] + ["EOS:0"] * bool(eos)
    backend.post_processor = TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=tokens)
