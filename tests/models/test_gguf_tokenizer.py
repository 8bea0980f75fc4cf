"""Tokenizers from GGUF metadata: against the models' own rules, a brute-force SentencePiece, and the real model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.tiny_tokenizers import CORPUS, SPECIAL, byte_level_keys, train_byte_level, write_byte_level, write_tokenizer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from batchinfer.models.files import ModelError
from batchinfer.models.tokenizer import load_tokenizer


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    pieces = [*" \n\t0123abcXYZ.,'!?|<>/_é日🙂٣½\u00a0", *SPECIAL]
    pieces += ["'s", "'LL", "  ", "the ", "e\u0301", "<tool>", "\r\n"]
    random = ["".join(rng.choice(pieces, rng.integers(0, 40))) for _ in range(count)]
    return CORPUS + random


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def own_rules() -> dict[str, Tokenizer]:
    """name of the rule in GGUF: a tokenizer as the models of that name have it in their tokenizer.json."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    # The expressions of Llama 3 and of Mistral NeMo, as their tokenizer.json files state them.
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    tekken = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return {
        "gpt-2": train_byte_level(byte_level),
        "smollm": train_byte_level(digits),
        "qwen2": train_byte_level(split(PRETOKENIZE_REGEX), normalizers.NFC()),
        "llama-bpe": train_byte_level(split(llama3), ignore_merges=True),
        "tekken": train_byte_level(split(tekken), ignore_merges=True),
    }


@pytest.mark.feature("models", "tokenizer and chat template from the folder or from the GGUF file")
@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"])
def test_splits_as_the_models_own_rule(name: str, tmp_path: Path) -> None:
    own = own_rules()[name]
    got = load_tokenizer(str(write_tokenizer(tmp_path / "x.gguf", byte_level_keys(own, name))))
    sample = texts(1000)
    bos = [1] if name in ("llama-bpe", "tekken") else []
    ids = got.encode_batch(sample)
    assert [item.tolist() for item in ids] == [bos + item.ids for item in own.encode_batch(sample)]
    assert got.decode_batch(ids) == own.decode_batch([item.tolist() for item in ids], skip_special_tokens=True)
    assert (got.bos_id, got.eos_ids, got.vocab_size) == (1, (0, 2), own.get_vocab_size())


def test_the_sample_tells_the_rules_apart(tmp_path: Path) -> None:
    """So the test above means something: one vocabulary under two names gives other ids somewhere."""
    sample = texts(1000)
    seen = []
    for name in ("gpt-2", "smollm", "qwen2", "llama-bpe", "tekken", "default"):
        got = load_tokenizer(str(write_byte_level(tmp_path / f"{name}.gguf", name)))
        seen.append([ids.tolist() for ids in got.encode_batch(sample, add_special_tokens=False)])
    assert all(seen.count(ids) == 1 for ids in seen)


def test_old_files_without_a_rule_split_as_llama_cpp_does(tmp_path: Path) -> None:
    got = load_tokenizer(str(write_byte_level(tmp_path / "x.gguf", "default")))
    assert got.encode_batch(["a"])[0].tolist() == got.encode_batch(["a"], add_special_tokens=False)[0].tolist()
    pieces = [p for p, _ in got._backend.pre_tokenizer.pre_tokenize_str("it's 1234567 a+b, <x>\n")]
    assert pieces == ["it", "'", "s", "Ġ", "123", "456", "7", "Ġa", "+", "b", ",", "Ġ", "<", "x", ">", "Ċ"]
    same = load_tokenizer(str(write_byte_level(tmp_path / "y.gguf", "default", tokenizer__ggml__pre=None)))
    sample = texts(100)
    for a, b in zip(got.encode_batch(sample), same.encode_batch(sample), strict=True):
        assert a.tolist() == b.tolist()


@pytest.mark.parametrize(
    ("bos", "eos", "want"), [(True, True, ([1], [2])), (False, True, ([], [2])), (True, None, ([1], []))]
)
def test_bos_and_eos_as_the_file_says(bos: bool, eos: bool | None, want: Any, tmp_path: Path) -> None:
    flags = {"tokenizer__ggml__add_bos_token": bos, "tokenizer__ggml__add_eos_token": eos}
    got = load_tokenizer(str(write_byte_level(tmp_path / "x.gguf", "gpt-2", **flags)))
    plain = got.encode_batch(["hello"], add_special_tokens=False)[0].tolist()
    assert got.encode_batch(["hello"])[0].tolist() == want[0] + plain + want[1]


def test_special_tokens_may_hold_blanks_and_colons(tmp_path: Path) -> None:
    names = ["<|end|>", "<begin: of text>", "<|stop|>"]
    tokens = [*names, "a", "b", "Ġ", "Ġb"]
    changes = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__token_type": [3, 3, 3, 1, 1, 1, 1]}
    path = write_byte_level(
        tmp_path / "x.gguf", "gpt-2", **changes, tokenizer__ggml__merges=["Ġ b"], tokenizer__ggml__add_bos_token=True
    )
    assert load_tokenizer(str(path)).encode_batch(["a b"])[0].tolist() == [1, 3, 6]


def test_chat_template_and_fingerprint(tmp_path: Path) -> None:
    got = load_tokenizer(str(write_byte_level(tmp_path / "x.gguf", "gpt-2")))
    assert got.has_chat_template
    assert got.render_chat([{"role": "user", "content": "hi"}]) == "<|start|>hi<|stop|>"
    other = load_tokenizer(str(write_byte_level(tmp_path / "y.gguf", "gpt-2", tokenizer__chat_template=None)))
    assert not other.has_chat_template
    assert other.fingerprint != got.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer__ggml__pre": "nobody-knows"},
            "tokenizer.ggml.pre='nobody-knows' is not known; known are gpt-2, smollm",
        ),
        ({"tokenizer__ggml__model": "t5"}, "tokenizer.ggml.model='t5' is not supported; supported are gpt2 and llama"),
        ({"tokenizer__ggml__model": None}, "no metadata key 'tokenizer.ggml.model'"),
        ({"tokenizer__ggml__tokens": None}, "no metadata key 'tokenizer.ggml.tokens'"),
        ({"tokenizer__ggml__tokens": [1, 2]}, "'tokenizer.ggml.tokens' must be a list of strings"),
        ({"tokenizer__ggml__merges": ["a zzz"]}, "merges holds 'a zzz', which is not made of its tokens"),
        ({"tokenizer__ggml__merges": ["a"]}, "merges holds 'a', which"),
        ({"tokenizer__ggml__bos_token_id": 9999}, r"bos_token_id=9999 is outside the vocabulary of \d+"),
        ({"tokenizer__ggml__add_bos_token": 1}, "'tokenizer.ggml.add_bos_token' must be bool, not int"),
        ({"tokenizer__ggml__model": "llama"}, "no metadata key 'tokenizer.ggml.scores'"),
        ({"tokenizer__ggml__model": "llama", "tokenizer__ggml__scores": [1.0]}, "must be of equal length"),
        ({"tokenizer__chat_template": "{% if %}"}, "chat template does not compile"),
    ],
)
def test_unusable_metadata_names_the_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_byte_level(tmp_path / "x.gguf", "gpt-2", **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)


# SentencePiece -------------------------------------------------------------------------------------------------------


def pieces_of(corpus: list[str], count: int) -> list[str]:
    """Frequent substrings of words, closed under "made of two smaller ones", most frequent first."""
    words = [word for text in corpus for word in ("▁" + text.replace(" ", " ▁")).split(" ")]
    chosen = dict.fromkeys(c for word in words for c in word if c < "\u4000" and c not in "\n\t\r\u00a0\u2003")
    while len(chosen) < count:
        pairs: dict[str, int] = {}
        for word in words:
            for i in range(len(word)):
                for j in range(i + 2, min(i + 7, len(word) + 1)):
                    part = word[i:j]
                    if part not in chosen and any(
                        part[:k] in chosen and part[k:] in chosen for k in range(1, len(part))
                    ):
                        pairs[part] = pairs.get(part, 0) + 1
        if not pairs:
            break
        chosen[max(sorted(pairs), key=pairs.__getitem__)] = None
    return list(chosen)


def brute_force(text: str, scores: dict[str, float], ids: dict[str, int]) -> list[int]:
    """SentencePiece BPE by its definition: merge the neighbours with the best score, the leftmost first, until there
    are none; what is no piece becomes its bytes."""
    parts = list(("▁" + text).replace(" ", "▁")) if text else []
    while True:
        candidates = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not candidates:
            break
        i = -max(candidates)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    out: list[int] = []
    for part in parts:
        out += [ids[part]] if part in scores else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


def test_sentencepiece_is_greedy_merging_by_score(tmp_path: Path) -> None:
    single = pieces_of(CORPUS[:3], 260)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *single]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(single)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(single))]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    got = load_tokenizer(str(write_tokenizer(tmp_path / "x.gguf", keys)))
    rng = np.random.default_rng(1)
    words = ["the ", "quick", "  ", "\n", "brown", "é", "日", "🙂", "1", "23", ".", "over", " ", "a", "aa", "in", "s"]
    sample = CORPUS[:3] + ["".join(rng.choice(words, rng.integers(0, 30))) for _ in range(300)]
    ids = {token: i for i, token in enumerate(tokens)}
    by_piece = {piece: -float(i) for i, piece in enumerate(single)}
    encoded = got.encode_batch(sample)
    assert [item.tolist() for item in encoded] == [[1, *brute_force(text, by_piece, ids)] for text in sample]
    assert got.decode_batch(encoded) == sample
    assert max(len(item) for item in encoded) > 20


@pytest.mark.model
def test_real_model_is_that_of_its_folder(smollm_dir: Path, smollm_gguf: Path, prompts_path: Path) -> None:
    """1000 random texts, the prompts, and this package's own source: the same ids and text from both containers."""
    import pyarrow.parquet as pq

    folder, file = load_tokenizer(str(smollm_dir)), load_tokenizer(str(smollm_gguf))
    rows = pq.read_table(prompts_path).to_pylist()
    source = "\n".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    sample = texts(1000) + [row["prompt"] for row in rows] + [source[i : i + 500] for i in range(0, len(source), 500)]
    a, b = folder.encode_batch(sample), file.encode_batch(sample)
    assert [x.tolist() for x in a] == [x.tolist() for x in b]
    assert folder.decode_batch(a) == file.decode_batch(a)
    assert (folder.bos_id, folder.eos_ids, folder.vocab_size) == (file.bos_id, file.eos_ids, file.vocab_size)
    assert all(folder.render_chat(row["messages"]) == file.render_chat(row["messages"]) for row in rows)
