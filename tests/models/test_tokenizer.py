"""Tokenizers of folders against transformers' AutoTokenizer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.tiny_models import edit_json
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from batchinfer.models.files import ModelError
from batchinfer.models.tokenizer import load_tokenizer

TEXTS = [
    "",
    "Hello world",
    " two  blanks\n\nand 12 lines\t",
    "naïve café, 日本 🙂",
    "<s> in the text </s>",
    "call <tool> or <later>now",
    "the quick brown fox " * 40,
    "\x00 control \u200b",
]


def train(path: Path, **changes: Any) -> Path:
    """A small byte-level BPE as tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def configure(folder: Path, **config: Any) -> Path:
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**plain, **config}))
    return folder


def with_map(folder: Path) -> Path:
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "pad_token": "<pad>"}')
    return folder


BOS = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])

CONFIGS: dict[str, Callable[[Path], Path]] = {
    "plain": lambda path: configure(train(path)),
    "without a config": train,
    "bos by the post-processor": lambda path: configure(train(path, post_processor=BOS)),
    "bos by the config alone": lambda path: configure(train(path), add_bos_token=True, add_eos_token=True),
    "bos against the config": lambda path: configure(train(path, post_processor=BOS), add_bos_token=False),
    "eos as an object": lambda path: configure(
        train(path), eos_token={"__type": "AddedToken", "content": "</s>", "lstrip": False}
    ),
    "a special token that is not there yet": lambda path: configure(train(path), pad_token="<pad>"),
    "more special tokens": lambda path: configure(train(path), extra_special_tokens=["<later>"]),
    "special tokens in their own file": lambda path: with_map(configure(train(path), bos_token="<unk>")),
    "special tokens in their own file, superseded": lambda path: with_map(
        configure(train(path), added_tokens_decoder={}, bos_token="<unk>")
    ),
    "added tokens": lambda path: configure(
        train(path),
        added_tokens_decoder={
            "401": {"content": "<later>", "special": False, "normalized": False, "rstrip": True},
            "2": {"content": "</s>", "special": True, "normalized": False, "lstrip": True},
        },
    ),
}


@pytest.mark.feature("models", "tokenizer and chat template from the folder or from the GGUF file")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_ids_and_text_as_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = CONFIGS[name](tmp_path)
    ours = load_tokenizer(str(folder))
    if name == "without a config":
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    else:
        theirs = AutoTokenizer.from_pretrained(folder)
    for special in (True, False):
        want = theirs(TEXTS, add_special_tokens=special)["input_ids"]
        got = ours.encode_batch(TEXTS, add_special_tokens=special)
        assert [ids.tolist() for ids in got] == want
        assert all(ids.dtype == np.int32 for ids in got)
        assert ours.decode_batch(got) == theirs.batch_decode(want, skip_special_tokens=True)
    if name != "without a config":
        assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path) -> None:
    folder = configure(train(tmp_path))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert [len(ids) for ids in load_tokenizer(str(folder)).encode_batch(["Hello world", ""])] != [64, 64]
    assert len(load_tokenizer(str(folder)).encode_batch([TEXTS[6]])[0]) > 64


def test_eos_ids_come_from_every_file(tmp_path: Path) -> None:
    folder = configure(train(tmp_path))
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert load_tokenizer(str(folder)).eos_ids == (2, 7, 9)


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("place", ["config", "list", "jinja", "json", "jinja before config"])
def test_templates_are_found_where_transformers_finds_them(place: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = configure(train(tmp_path))
    other = "{{ 'another' }}"
    if place == "config":
        configure(folder, chat_template=TEMPLATE)
    if place == "list":
        named = [{"name": "tool_use", "template": other}, {"name": "default", "template": TEMPLATE}]
        configure(folder, chat_template=named)
    if place.startswith("jinja"):
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    if place == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    if place == "jinja before config":
        edit_json(folder / "tokenizer_config.json", chat_template=other)
    ours = load_tokenizer(str(folder))
    assert ours.has_chat_template
    assert ours.render_chat(MESSAGES) == "<s>user: Hello\n"
    if place != "json":  # transformers reads that file for processors only
        theirs = AutoTokenizer.from_pretrained(folder)
        assert ours.render_chat(MESSAGES) == theirs.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=True
        )


def test_without_a_template(tmp_path: Path) -> None:
    ours = load_tokenizer(str(configure(train(tmp_path))))
    assert not ours.has_chat_template
    with pytest.raises(ValueError, match="no chat template: use a prompt column"):
        ours.render_chat(MESSAGES)


def test_fingerprint_changes_with_everything_that_decides(tmp_path: Path) -> None:
    folder = configure(train(tmp_path))
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    seen = [load_tokenizer(str(folder)).fingerprint]
    assert load_tokenizer(str(folder)).fingerprint == seen[0]
    configure(folder, add_bos_token=True)
    seen.append(load_tokenizer(str(folder)).fingerprint)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    seen.append(load_tokenizer(str(folder)).fingerprint)
    edit_json(folder / "tokenizer.json", pre_tokenizer=None)
    seen.append(load_tokenizer(str(folder)).fingerprint)
    (folder / "generation_config.json").write_text('{"eos_token_id": 8}')
    seen.append(load_tokenizer(str(folder)).fingerprint)
    (folder / "config.json").write_text('{"eos_token_id": 9}')
    seen.append(load_tokenizer(str(folder)).fingerprint)
    assert len(set(seen)) == len(seen)
    (folder / "README.md").write_text("changed")
    assert load_tokenizer(str(folder)).fingerprint == seen[-1]


def test_old_vocabulary_files_go_through_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = train(tmp_path)
    Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    end = "</s>"
    configure(folder, tokenizer_class="GPT2Tokenizer", eos_token=end, bos_token=end, unk_token=end)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    ours, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert [ids.tolist() for ids in ours.encode_batch(TEXTS)] == theirs(TEXTS)["input_ids"]
    assert ours.eos_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), r"(?s)has no tokenizer\.json, .* copy the whole model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer\.json is not a tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), r"tokenizer\.json is not a tokenizer"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("["),
            r"tokenizer_config\.json is not valid JSON",
        ),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"), "chat template does not compile"),
        (lambda folder: configure(folder, chat_template=7), "chat_template must be a string or a list"),
        (lambda folder: configure(folder, eos_token=["</s>"]), r"\['</s>'\] is no token"),
        (lambda folder: configure(folder, extra_special_tokens="x"), "extra_special_tokens must be a list or"),
        (lambda folder: configure(folder, added_tokens_decoder={"x": {}}), "added_tokens_decoder must map ids"),
        (lambda folder: configure(folder, added_tokens_decoder={"1": "x"}), "added_tokens_decoder must map ids"),
    ],
)
def test_unusable_folders(spoil: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    spoil(configure(train(tmp_path)))
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_encoding_lets_other_threads_run(tmp_path: Path) -> None:
    """The reader thread encodes while the engine computes: the library must release the GIL."""
    ours = load_tokenizer(str(configure(train(tmp_path))))
    texts = ["".join(chr(97 + (i * j) % 26) for j in range(20_000)) for i in range(40)]
    ticks = 0
    worker = threading.Thread(target=ours.encode_batch, args=(texts,))
    worker.start()
    while worker.is_alive():
        worker.join(0.0005)
        ticks += 1
    assert ticks > 10


@pytest.mark.model
def test_real_model_as_transformers_does(smollm_dir: Path, prompts_path: Path) -> None:
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(str(smollm_dir)), AutoTokenizer.from_pretrained(smollm_dir)
    rows = pq.read_table(prompts_path).to_pylist()
    texts = [row["prompt"] for row in rows] + TEXTS
    ids = ours.encode_batch(texts)
    assert [item.tolist() for item in ids] == theirs(texts)["input_ids"]
    assert ours.decode_batch(ids) == theirs.batch_decode([item.tolist() for item in ids], skip_special_tokens=True)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (49152, 1, (2,))
    for row in rows:
        want = theirs.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        assert ours.render_chat(row["messages"]) == want
