"""Hostile model folders: a clear refusal in bounded time and memory, and nothing is ever run or fetched."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.bounded import Failure, bounded
from faults.sizes import tally
from models.tiny_models import edit_json, write_safetensors
from models.tiny_tokenizers import train_byte_level
from tokenizers import pre_tokenizers

from batchinfer.models.files import MAX_JSON_BYTES
from batchinfer.models.identity import model_fingerprint
from batchinfer.models.layout import layout
from batchinfer.models.spec import load_spec
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.models.weights import load_weights
from batchinfer.types import ExitCode

torch = pytest.importorskip("torch")

SECONDS, RSS_MIB = 30, 2048.0
MESSAGES = [{"role": "user", "content": "hello " * 50}]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 760,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    return train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str()


@pytest.fixture
def model(tokenizer_json: str, tmp_path: Path) -> Path:
    """A whole, tiny model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(tokenizer_json)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    entries, data = tensors(folder)
    write_safetensors(folder / WEIGHTS, entries, data)
    return folder


def tensors(folder: Path) -> tuple[dict[str, Any], bytes]:
    entries: dict[str, Any] = {}
    end = 0
    for name, part in layout(load_spec(str(folder))).parts.items():
        size = 4 * int(torch.tensor(part.shape).prod())
        entries[name] = {"dtype": "F32", "shape": list(part.shape), "data_offsets": [end, end + size]}
        end += size
    return entries, bytes(end)


def use(folder: str) -> str:
    """Everything that a job does with a model before and at the first row."""
    model_fingerprint(folder)
    spec = load_spec(folder)
    for _ in load_weights(folder, spec, torch.bfloat16):
        pass
    tokenizer = load_tokenizer(folder)
    text = tokenizer.render_chat(MESSAGES)
    (ids,) = tokenizer.encode_batch([text], add_special_tokens=False)
    if ids.max() >= spec.vocab_size:
        raise ValueError(f"token {ids.max()} is outside the embedding")  # the engine makes an error row of it
    return "used"


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The weights with another header over the same bytes."""

    def spoil(folder: Path) -> None:
        entries, data = tensors(folder)
        change(entries)
        write_safetensors(folder / WEIGHTS, entries, data)

    return spoil


def raw(head: bytes, length: int | None = None, data: bytes = b"") -> Callable[[Path], None]:
    """The weights with exactly this header."""
    size = struct.pack("<Q", len(head) if length is None else length)
    return lambda folder: (folder / WEIGHTS).write_bytes(size + head + data)


def shards(names: dict[str, Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))

    return spoil


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def template(source: str) -> Callable[[Path], None]:
    return text("chat_template.jinja", source)


def pickled(name: str) -> Callable[[Path], None]:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, ("touch /tmp/batchinfer-was-here",)

    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(Bomb()))

    return spoil


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else in the place of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def with_code(folder: Path) -> None:
    """The architecture's code comes with the model."""
    edit_json(
        folder / "config.json",
        architectures=["EvilForCausalLM"],
        auto_map={"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"},
    )
    for name in ("configuration_evil.py", "modeling_evil.py"):
        (folder / name).write_text("import os\nos.system('touch /tmp/batchinfer-was-here')\n")


def tokenizer_with_code(folder: Path) -> None:
    """No tokenizer.json, so that transformers is asked, and a tokenizer class of the model's own."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenization_evil.py").write_text("import os\nos.system('touch /tmp/batchinfer-was-here')\n")
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]},
    )


def grow(name: str, size: int) -> Callable[[Path], None]:
    """A file with a hole: large at no cost."""
    return lambda folder: os.truncate(folder / name, size)


def set_entry(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries[name].update(values)


NORM = "model.norm.weight"
LOOP = "{% for i in range(99999) %}"
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    # weights that are code
    "pickle .bin": (pickled("pytorch_model.bin"), "pickle"),
    "pickle .pt": (pickled("model.pt"), "pickle"),
    "pickle .pth": (pickled("consolidated.00.pth"), "pickle"),
    "pickle .ckpt": (pickled("model.ckpt"), "pickle"),
    "pickle named safetensors": (text(WEIGHTS, pickle.dumps([1, 2, 3])), "header|truncated|safetensors"),
    "code of the model's own": (with_code, "never run"),
    "a tokenizer with code": (tokenizer_with_code, r"tokenizer\.json"),
    # names that lead out of the folder
    "traversal in the index": (shards({NORM: "../../secret.safetensors"}), "plain file names"),
    "an absolute path in the index": (shards({NORM: "/etc/passwd"}), "plain file names"),
    "a NUL in the index": (shards({NORM: "model\0.safetensors"}), "plain file names"),
    "a number in the index": (shards({NORM: 7}), "plain file names"),
    "an index without a map": (shards({}), "weight_map"),
    "missing shards": (shards({NORM: "model-00002.safetensors"}), "lacks 1 of the 1 shards"),
    "an index of another model": (
        shards({"other": "model-00001.safetensors"}),
        "the shards are of another model|is not",
    ),
    "a symbolic link to another kind of file": (instead(WEIGHTS, lambda p: p.symlink_to("/etc/passwd")), "safetensors"),
    "a symbolic link to a device": (instead("config.json", lambda p: p.symlink_to("/dev/zero")), "regular file"),
    "an endless template": (instead("chat_template.jinja", lambda p: p.symlink_to("/dev/zero")), "regular file"),
    "an endless tokenizer": (instead("tokenizer.json", lambda p: p.symlink_to("/dev/zero")), "regular file"),
    "a pipe": (instead("tokenizer.json", os.mkfifo), "regular file"),
    "a pipe for weights": (instead(WEIGHTS, os.mkfifo), "regular file"),
    "a link to itself": (instead(WEIGHTS, lambda p: p.symlink_to(p)), "neither|symbolic"),
    "a folder for weights": (instead(WEIGHTS, os.mkdir), "regular file|directory"),
    # the table of tensors
    "a header beyond the limit": (raw(b"{}", 2**63), "the format allows"),
    "a header of all bits": (raw(b"{}", 2**64 - 1), "the format allows"),
    "a header longer than the file": (raw(b"{}", 10_000), "truncated"),
    "a header that is no object": (raw(b"[1, 2]"), "does not begin with"),
    "a header that is no JSON": (raw(b"{'a': 1}"), "not valid JSON"),
    "a header that is no UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "a key twice": (raw(b'{"a": {}, "a": {}}'), "twice"),
    "a deep header": (raw(b'{"a":' * 200_000), "not valid JSON"),
    "overlapping tensors": (header(set_entry(NORM, data_offsets=[0, 64])), "overlap|belong to no tensor"),
    "a hole": (header(lambda e: e.pop(NORM)), "belong to no tensor"),
    "offsets beyond the end": (header(set_entry(NORM, data_offsets=[2**60, 2**60 + 64])), "belong to no|truncated"),
    "negative offsets": (header(set_entry(NORM, data_offsets=[-64, 0])), "data_offsets"),
    "offsets backwards": (header(set_entry(NORM, data_offsets=[64, 0])), "data_offsets"),
    "a shape that overflows": (header(set_entry(NORM, shape=[2**40, 2**40])), "needs"),
    "a negative shape": (header(set_entry(NORM, shape=[-16])), "shape"),
    "a shape of fractions": (header(set_entry(NORM, shape=[16.0])), "shape"),
    "a size that does not fit the shape": (header(set_entry(NORM, shape=[17])), "needs 68 bytes"),
    "an unknown dtype": (header(set_entry(NORM, dtype="F33")), "unknown dtype"),
    "a dtype that is not read": (header(set_entry(NORM, dtype="I32")), "supported are"),
    "another shape than the config's": (header(set_entry(NORM, shape=[4, 4])), "the config makes it"),
    "a tensor missing": (
        header(lambda e: e.update({"model.layers.9.input_layernorm.weight": e.pop(NORM)})),
        "no use|lacks",
    ),
    "bytes after the end": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"PK\x03\x04"),
        "belong to no tensor",
    ),
    "a truncated file": (lambda f: os.truncate(f / WEIGHTS, 20_000), "truncated"),
    "an empty file": (text(WEIGHTS, b""), "0 bytes"),
    "a Git LFS pointer": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\nsize 1\n"), "allows"),
    # the configuration
    "a deep config": (text("config.json", '{"a":' * 200_000), "not valid JSON"),
    "a huge config": (grow("config.json", MAX_JSON_BYTES + 1), "larger than"),
    "a config that is a list": (text("config.json", "[]"), "JSON object"),
    "a key twice in the config": (text("config.json", '{"vocab_size": 1, "vocab_size": 2}'), "twice"),
    "a number of a million digits": (text("config.json", '{"vocab_size": ' + "9" * 10**6 + "}"), "not valid JSON"),
    "more layers than there are": (config(num_hidden_layers=2**30), "more than any model has"),
    "a huge width": (config(hidden_size=2**31 - 1), "shape|multiple"),
    "a huge vocabulary": (config(vocab_size=2**31 - 1), "shape"),
    "a vocabulary below the tokenizer's": (config(vocab_size=300), "shape|outside the embedding"),
    "a negative size": (config(intermediate_size=-1), "whole number above 0"),
    "not a number": (config(rms_norm_eps="1e-5"), "must be a number"),
    "no heads": (config(num_attention_heads=0), "whole number above 0"),
    "heads that do not share": (config(num_attention_heads=8, num_key_value_heads=3), "evenly|shape"),
    "a quantised model": (config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    # the tokenizer
    "a deep tokenizer": (text("tokenizer.json", '{"a":' * 200_000), "tokenizer"),
    "a huge tokenizer": (grow("tokenizer.json", MAX_JSON_BYTES + 1), "larger than"),
    "a tokenizer that is no JSON": (text("tokenizer.json", b"\x80\x04K\x01."), "tokenizer"),
    "special tokens of a wrong kind": (text("tokenizer_config.json", '{"bos_token": [1]}'), "no token"),
    "an id that is no number": (text("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'), "added_tokens"),
    # the template
    "a template that loops": (template(LOOP * 3 + "{% endfor %}" * 3), "turns of loops"),
    "a template of 200 MB": (template("{{ 'x' * 200000000 }}"), "the template makes more"),
    "a template that prints 200 MB": (template(LOOP + "{{ 'x' * 2100 }}{% endfor %}"), "longer than|makes more"),
    "a template that doubles": (
        template("{% set n = namespace(x='ab') %}" + LOOP + "{% set n.x = n.x ~ n.x %}{% endfor %}"),
        "the template makes more",
    ),
    "a template that recurses": (
        template("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"),
        "turns of loops",
    ),
    "a template that reaches for classes": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "unsafe"),
    "a template that reaches for globals": (template("{{ raise_exception.__globals__['os'].system('x') }}"), "unsafe"),
    "a template that reads files": (template("{% include '/etc/passwd' %}"), "loader"),
    "a template that is too deep": (template("{{ " + "(" * 50_000 + ")" * 50_000 + " }}"), "deep|too large|unexpected"),
    "a huge template": (template("x" * (2 << 20)), "characters"),
    "a template that is no UTF-8": (text("chat_template.jinja", b"\xff\xfe"), "utf-8"),
    "a template of a wrong kind": (text("tokenizer_config.json", '{"chat_template": 7}'), "chat_template"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.feature("safety", "hostile model folders: refused in bounded time and memory, nothing run or fetched")
def test_a_hostile_model_is_refused(name: str, model: Path) -> None:
    spoil, reason = HOSTILE[name]
    spoil(model)
    outcome = bounded(lambda: use(str(model)), seconds=SECONDS)
    assert outcome.signal == 0, f"signal {outcome.signal} after {outcome.seconds:.1f} s"
    assert isinstance(outcome.value, Failure), "it was used"
    assert outcome.value.name in ("ModelError", "ValueError"), outcome.value  # ValueError: the row's error
    assert outcome.value.exit_code in (None, ExitCode.USAGE)
    assert re.search(reason, outcome.value.text), outcome.value.text
    assert outcome.rss_mib < RSS_MIB
    assert outcome.events == ()
    assert not Path("/tmp/batchinfer-was-here").exists()
    tally["hostile model folders, refused"] += 1


def test_the_model_itself_is_used(model: Path) -> None:
    assert use(str(model)) == "used"


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|a)*b", r"(.*)*x"])
def test_a_slow_pattern_of_the_tokenizer_comes_to_an_end(pattern: str, model: Path) -> None:
    """The tokenizers library bounds its regular expressions' retries; a long text must come back all the same."""
    value = json.loads((model / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    (model / "tokenizer.json").write_text(json.dumps(value))

    def encode() -> int:
        (ids,) = load_tokenizer(str(model)).encode_batch(["a" * 3000 + "!"])
        return len(ids)

    outcome = bounded(encode, seconds=60)
    assert outcome.signal == 0, f"signal {outcome.signal} after {outcome.seconds:.1f} s"
    tally["slow patterns of a tokenizer, ended"] += 1
