"""Poison rows among good ones: each gets its error or its answer, and its neighbours do not notice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.fakes import invalid_text
from fake_engine import POISON, FakeEngine, identify_fake
from faults.harness import configuration
from faults.sizes import size, tally

from batchinfer import job
from batchinfer.cluster.world import World
from batchinfer.config import from_dict
from batchinfer.data.audit import verify

MAX_LEN = 4096
OK = None
"""Instead of an error code: the row is unusual, and has an answer."""

Poison = tuple[str, Any, str | None]  # what it is, its value, the error code it must get

LONG = "PROMPT_TOO_LONG"
TEXTS: list[Poison] = [
    ("null", None, "NULL_PROMPT"),
    ("empty", "", "EMPTY_PROMPT"),
    ("a blank", " ", OK),
    ("a line break", "\n", OK),
    ("a NUL", "\0", OK),
    ("NULs", "a\0b\0", OK),
    ("control characters", "".join(map(chr, range(1, 32))), OK),
    ("DEL and C1", "\x7f\x80\x9f", OK),
    ("a byte order mark", "\ufeffhello", OK),
    ("right to left", "שלום عليكم", OK),
    ("an override of direction", "a\u202eb\u202c", OK),
    ("emoji", "👨‍👩‍👧🏳️‍🌈🙂", OK),
    ("a lone joiner", "\u200d", OK),
    ("combining characters", "e" + "\u0301" * 50, OK),
    ("beyond the basic plane", "\U0010ffff\U0001f600", OK),
    ("noncharacters", "\ufffe\uffff", OK),
    ("a replacement character", "\ufffd", OK),
    ("Han", "漢字かな交じり文", OK),
    ("looks like special tokens", "<|im_start|>system<|im_end|></s><s>[INST]", OK),
    ("looks like a template", "{{ 7 * 7 }}{% for x in y %}", OK),
    ("looks like a format", "%s %d {} {0.__class__}", OK),
    ("looks like SQL", "'; DROP TABLE rows; --", OK),
    ("looks like a path", "../../etc/passwd", OK),
    ("looks like null", "null None NaN nan", OK),
    ("looks like JSON", '{"role": "system"}', OK),
    ("as long as fits", "x" * (MAX_LEN - 1), OK),
    ("one too long", "x" * MAX_LEN, LONG),
    ("a megabyte", "x" * 2**20, LONG),
    ("ten megabytes", "x" * 10 * 2**20, LONG),
    ("twenty megabytes", "é" * 10 * 2**20, LONG),
    ("what the engine refuses", f"a {POISON}", "KV_CAPACITY"),
    ("a lone byte", b"\xff", "INVALID_UTF8"),
    ("a cut character", "é".encode()[:1], "INVALID_UTF8"),
    ("a surrogate", b"\xed\xa0\x80", "INVALID_UTF8"),
    ("an overlong slash", b"\xc0\xaf", "INVALID_UTF8"),
    ("beyond Unicode", b"\xf4\x90\x80\x80", "INVALID_UTF8"),
    ("UTF-16", "hello".encode("utf-16"), "INVALID_UTF8"),
    ("Latin-1", "naïve".encode("latin-1"), "INVALID_UTF8"),
    ("a good text with a bad end", b"hello\x80", "INVALID_UTF8"),
    ("a bad text that is too long", b"\xff" * 10**6, "INVALID_UTF8"),
]


def say(*turns: tuple[Any, Any]) -> list[Any]:
    return [{"role": role, "content": content} for role, content in turns]


USER = ("user", "hello")
CHATS: list[Poison] = [
    ("null", None, "NULL_PROMPT"),
    ("no message", [], "EMPTY_PROMPT"),
    ("a null message", [None], "BAD_MESSAGES"),
    ("a null after a message", [*say(USER), None], "BAD_MESSAGES"),
    ("a null role", say((None, "x")), "BAD_MESSAGES"),
    ("a null content", say(("user", None)), "BAD_MESSAGES"),
    ("an unknown role", say(("root", "x")), "BAD_MESSAGES"),
    ("an empty role", say(("", "x")), "BAD_MESSAGES"),
    ("a role in capitals", say(("User", "x")), "BAD_MESSAGES"),
    ("a role with a blank", say(("user ", "x")), "BAD_MESSAGES"),
    ("a role like a template", say(("{{ x }}", "x")), "BAD_MESSAGES"),
    ("an empty content", say(("user", "")), OK),
    ("a content like a template", say(("user", "{% for %}")), OK),
    ("a content like special tokens", say(("user", "<|im_end|><|im_start|>assistant")), OK),
    ("a NUL", say(("user", "\0")), OK),
    ("twice the same", say(USER, USER), OK),
    ("an assistant first", say(("assistant", "x")), OK),
    ("a thousand messages", say(*[("user", "a")] * 500), OK),
    ("ten thousand messages", say(*[("user", "a")] * 10_000), LONG),
    ("a long content", say(("user", "x" * 10**6)), LONG),
    ("a long role", say(("x" * 10**6, "x")), "BAD_MESSAGES"),
    ("what the engine refuses", say(("user", POISON)), "KV_CAPACITY"),
]
INVALID_CHATS: list[Poison] = [
    ("a content that is no UTF-8", say((b"user", b"\xff")), "INVALID_UTF8"),
    ("a role that is no UTF-8", say((b"\xff", b"x")), "INVALID_UTF8"),
    ("a good one as bytes", say((b"user", b"x")), OK),
]

IDS: list[Poison] = [
    ("null", None, "NULL_PROMPT"),
    ("none", [], "EMPTY_PROMPT"),
    ("a null", [1, None, 2], "BAD_TOKEN_IDS"),
    ("nulls alone", [None], "BAD_TOKEN_IDS"),
    ("a negative one", [1, -1], "BAD_TOKEN_IDS"),
    ("beyond the vocabulary", [256], "BAD_TOKEN_IDS"),
    ("the last of the vocabulary", [255], OK),
    ("zero", [0], OK),
    ("beyond 32 bits", [2**32 + 5], "BAD_TOKEN_IDS"),
    ("the largest", [2**63 - 1], "BAD_TOKEN_IDS"),
    ("the smallest", [-(2**63)], "BAD_TOKEN_IDS"),
    ("the last is bad", [1] * 50 + [999], "BAD_TOKEN_IDS"),
    ("as many as fit", [7] * (MAX_LEN - 1), OK),
    ("one too many", [7] * MAX_LEN, LONG),
    ("a million", [7] * 10**6, LONG),
]

SETTINGS: dict[str, tuple[pa.DataType, list[Poison]]] = {
    "max_tokens": (
        pa.int64(),
        [(f"{v}", v, "BAD_SAMPLING") for v in (0, -1, 2**20 + 1, 2**31, 2**62, -(2**63))] + [("one", 1, OK)],
    ),
    "temperature": (
        pa.float64(),
        [(f"{v}", v, "BAD_SAMPLING") for v in (-0.1, math.nan, math.inf, -math.inf, 100.5, 1e308)]
        + [("a tiny one", 1e-300, OK), ("minus zero", -0.0, OK)],
    ),
    "top_p": (
        pa.float32(),
        [(f"{v}", v, "BAD_SAMPLING") for v in (0.0, -1.0, 1.5, math.nan, math.inf)] + [("tiny", 1e-30, OK)],
    ),
    "min_p": (pa.float64(), [(f"{v}", v, "BAD_SAMPLING") for v in (-0.1, 1.1, math.nan)]),
    "top_k": (
        pa.float64(),
        [(f"{v}", v, "BAD_SAMPLING") for v in (0.5, -1.0, math.nan, math.inf, 1e300)] + [("whole", 5.0, OK)],
    ),
    "repetition_penalty": (pa.float64(), [(f"{v}", v, "BAD_SAMPLING") for v in (0.0, -1.0, 101.0, math.nan)]),
    "presence_penalty": (pa.float64(), [(f"{v}", v, "BAD_SAMPLING") for v in (-101.0, 101.0, math.nan, math.inf)]),
    "frequency_penalty": (pa.float64(), [(f"{v}", v, "BAD_SAMPLING") for v in (-101.0, 1e10, math.nan)]),
    "seed": (pa.int64(), [("-1", -1, "BAD_SAMPLING"), ("the largest", 2**63 - 1, OK), ("zero", 0, OK)]),
    "min_tokens": (pa.int64(), [(f"{v}", v, "BAD_SAMPLING") for v in (-1, 17, 2**40)]),
    "logprobs": (pa.int64(), [(f"{v}", v, "BAD_SAMPLING") for v in (-1, 65)]),
    "stop": (
        pa.list_(pa.string()),
        [
            ("an empty text", [""], "BAD_SAMPLING"),
            ("a null in it", ["a", None], "BAD_SAMPLING"),
            ("no text", [], OK),
            ("a thousand", ["z"] * 1000, OK),
            ("a NUL", ["\0"], OK),
        ],
    ),
    "stop_token_ids": (pa.list_(pa.int64()), [("a null in it", [1, None], "BAD_SAMPLING"), ("none", [], OK)]),
    "allowed_token_ids": (pa.list_(pa.int64()), [("a null in it", [None], "BAD_SAMPLING"), ("none", [], OK)]),
    "bad_words": (pa.list_(pa.string()), [("blanks", ["a", "  "], "BAD_SAMPLING"), ("a word", ["a"], OK)]),
    "logit_bias": (
        pa.map_(pa.int64(), pa.float32()),
        [
            ("a null in it", [(1, None)], "BAD_SAMPLING"),
            ("none", [], OK),
            *((f"{v}", [(1, v)], "BAD_SAMPLING") for v in (math.nan, math.inf, 101.0)),
        ],
    ),
    "best_of": (pa.int64(), [(f"{v}", v, "BAD_SAMPLING") for v in (-1, 1025, 2**40)] + [("three", 3, OK)]),
    "beam_width": (pa.int64(), [(f"{v}", v, "BAD_SAMPLING") for v in (-1, 33, 2**40)] + [("none", 0, OK)]),
    "prompt_logprobs": (pa.int64(), [(f"{v}", v, "BAD_SAMPLING") for v in (-1, 65)]),
    "truncate_prompt_tokens": (pa.int64(), [(f"{v}", v, "BAD_SAMPLING") for v in (-1, 2**40)] + [("one", 1, OK)]),
    "n": (pa.int64(), [(f"{v}", v, "BAD_SAMPLING") for v in (0, -5, 1025, 2**40)] + [("three", 3, OK)]),
}


def engine(*_: object, **__: object) -> FakeEngine:
    return FakeEngine(slots=16, max_seq_len=MAX_LEN)


def run(table: pa.Table, folder: Path, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The output rows of a job over ``table``; folder/out must pass verification."""
    folder.mkdir()
    pq.write_table(table, folder / "in.parquet", row_group_size=64)
    values = configuration(folder / "in.parquet", folder / "out", {"input.columns": ["i"], **changes})
    code = job.run(from_dict(values), World(), engine, identify_fake)
    assert code in (0, 3)
    assert verify(str(folder / "out")).ok
    rows = [row for part in sorted((folder / "out").glob("part-*")) for row in pq.read_table(part).to_pylist()]
    assert [row["i"] for row in rows] == list(range(table.num_rows))
    return rows


def plant(poisons: Sequence[Poison], good: Any) -> tuple[list[Any], list[Any], list[int]]:
    """Values with every poison between good ones, the same with good ones in their places, and where they are."""
    bad, clean, places = [], [], []
    for _, value, _ in poisons:
        bad += [good, value]
        clean += [good, good]
        places.append(len(bad) - 1)
    return [*bad, good], [*clean, good], places


def check(
    poisons: Sequence[Poison],
    bad: pa.Array,
    clean: pa.Array,
    places: list[int],
    column: str,
    where: Path,
    **changes: Any,
) -> None:
    others = changes.pop("others", {})
    number = pa.array(range(len(bad)))
    without = run(pa.table({"i": number, column: clean, **others}), where / "clean", changes)
    rows = run(pa.table({"i": number, column: bad, **others}), where / "bad", changes)
    assert all(row["status"] == "ok" for row in without)
    planted = dict(zip(places, poisons, strict=True))
    for i, row in enumerate(rows):
        if i not in planted:
            assert row == without[i], f"row {i}, a neighbour of poison, has changed"
            continue
        name, _, code = planted[i]
        assert row["error_code"] == code, f"{name}: {row['error_code']}, {row['error']}"
        assert (row["status"] == "ok") == (code is None), name
        assert (row["generated_text"] is not None) == (code is None), name
        assert code is None or 0 < len(row["error"].encode()) <= 1000, name
    tally["poison rows, classified, neighbours the same"] += len(poisons)


@pytest.mark.feature("job", "poison rows (texts, chats, token ids, settings): classified, neighbours unchanged")
@pytest.mark.parametrize("stored_as", ["string", "binary", "dictionary"])
def test_texts(stored_as: str, tmp_path: Path) -> None:
    poisons = [p for p in TEXTS if stored_as == "binary" or not isinstance(p[1], bytes) or stored_as == "string"]
    if stored_as == "dictionary":
        poisons = [p for p in TEXTS if not isinstance(p[1], bytes)]
    bad, clean, places = plant(poisons, "a good row")
    as_bytes = [v.encode() if isinstance(v, str) else v for v in bad]
    if stored_as == "dictionary":
        column = pa.array(bad, pa.string()).dictionary_encode()
    else:
        column = invalid_text(as_bytes) if stored_as == "string" else pa.array(as_bytes, pa.binary())
    check(poisons, column, pa.array(clean), places, "prompt", tmp_path)


def test_texts_in_a_template(tmp_path: Path) -> None:
    codes = {"NULL_PROMPT": "TEMPLATE_ERROR", "EMPTY_PROMPT": OK}
    poisons = [(name, value, codes.get(code, code)) for name, value, code in TEXTS if not name.startswith("as long")]
    bad, clean, places = plant(poisons, "a good row")
    column = invalid_text([v.encode() if isinstance(v, str) else v for v in bad])
    template = {"input.template": "Q: {{ prompt }}"}
    check(poisons, column, pa.array(clean), places, "prompt", tmp_path, **template)


def test_chats(tmp_path: Path) -> None:
    bad, clean, places = plant(CHATS, say(USER))
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    source = {"input.messages_column": "messages"}
    check(CHATS, pa.array(bad, kind), pa.array(clean, kind), places, "messages", tmp_path, **source)


def test_chats_that_are_no_utf8(tmp_path: Path) -> None:
    bad, clean, places = plant(INVALID_CHATS, say((b"user", b"hello")))
    kind = pa.list_(pa.struct([("role", pa.binary()), ("content", pa.binary())]))
    source = {"input.messages_column": "messages"}
    check(INVALID_CHATS, pa.array(bad, kind), pa.array(clean, kind), places, "messages", tmp_path, **source)


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int64())], ids=str)
def test_token_ids(kind: pa.DataType, tmp_path: Path) -> None:
    bad, clean, places = plant(IDS, [1, 2, 3])
    source = {"input.token_ids_column": "ids"}
    check(IDS, pa.array(bad, kind), pa.array(clean, kind), places, "ids", tmp_path, **source)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_row(name: str, tmp_path: Path) -> None:
    kind, poisons = SETTINGS[name]
    bad, clean, places = plant(poisons, None)
    prompts = {"prompt": [f"row {i}" for i in range(len(bad))]}
    changes = {"input.sampling_columns": {name: "setting"}}
    check(poisons, pa.array(bad, kind), pa.array(clean, kind), places, "setting", tmp_path, others=prompts, **changes)


def test_one_good_row_among_poison(tmp_path: Path) -> None:
    texts = [None, "", "good", None, f"{POISON}", "x" * 10**6]
    rows = run(pa.table({"i": range(6), "prompt": texts}), tmp_path / "a", {"sampling.seed": 3})
    assert [row["status"] for row in rows] == ["error", "error", "ok", "error", "error", "error"]
    alone = run(
        pa.table({"i": range(6), "prompt": ["a", "b", "good", "c", "d", "e"]}), tmp_path / "b", {"sampling.seed": 3}
    )
    assert rows[2] == alone[2]


def test_no_answer_goes_to_another_row(tmp_path: Path) -> None:
    """A canary in every prompt; the stub's answer depends on the whole prompt, so a mixed-up row would show."""
    count = size(600, 3000)
    prompts = [f"canary {i:06d} {np.random.default_rng(i).bytes(8).hex()}" for i in range(count)]
    forth = run(pa.table({"i": range(count), "prompt": prompts}), tmp_path / "a", {"output.rows_per_chunk": 100})
    small = run(pa.table({"i": range(count), "prompt": prompts}), tmp_path / "b", {"output.rows_per_chunk": 1024})
    assert forth == small
    tally["canary rows, each with its own answer"] += count


def test_there_are_enough_kinds() -> None:
    settings = sum(len(poisons) for _, poisons in SETTINGS.values())
    assert len(TEXTS) + len(CHATS) + len(INVALID_CHATS) + len(IDS) + settings >= 130
