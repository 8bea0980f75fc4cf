"""Small byte-level tokenizers, and GGUF files that hold nothing but a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|end|>", "<|start|>", "<|stop|>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog, isn't it? I'LL say WE'VE seen 12345 of them in 2024.\n\n  1. one\n",
    "naïve café déjà vu; été ½ Ⅷ ٣٤ 你好世界 日本語 🙂👨‍👩‍👧 CamelCase HTTPServer x_y+z==0 <= a/b//c\r\n\tx = {1: 'a'}",
    "   leading blanks\n \n\t\tmixed   \n\n\n7 numbers 000 111 2222 3.14159e-10 €5 ... !!! ???\u00a0nbsp\u2003em",
] * 3


def train_byte_level(
    pre: pre_tokenizers.PreTokenizer, normalizer: Any = None, ignore_merges: bool = False
) -> Tokenizer:
    """A byte-level BPE that splits with ``pre``."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def write_tokenizer(path: Path, keys: dict[str, Any]) -> Path:
    """A GGUF file of metadata alone."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_keys(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    added = tokenizer.get_added_tokens_decoder()
    kinds = [1 if i not in added else 3 if added[i].special else 4 for i in range(len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    }


def write_byte_level(path: Path, name: str, **changes: Any) -> Path:
    tokenizer = train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    keys = byte_level_keys(tokenizer, name) | {key.replace("__", "."): value for key, value in changes.items()}
    return write_tokenizer(path, {key: value for key, value in keys.items() if value is not None})
