"""What makes another job of it is refused with the field's name; what does not is accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import FakeEngine, load_fake
from faults.harness import configuration
from faults.sizes import tally

from batchinfer import fingerprint, job
from batchinfer.cluster.world import World
from batchinfer.config import from_dict
from batchinfer.types import ExitCode, JobError

MODEL = {"config": "c0", "weights": "w0", "tokenizer": "t0"}
TEXTS = [f"text {i}" for i in range(12)]
MESSAGES = [[{"role": "user", "content": text}] for text in TEXTS]


def write(folder: Path) -> Path:
    """Two files with a column for every kind of prompt and for every setting that a row can override."""
    folder.mkdir(parents=True)
    for name, low in (("a", 0), ("b", 6)):
        columns = {
            "prompt": TEXTS[low : low + 6],
            "question": [text.upper() for text in TEXTS[low : low + 6]],
            "messages": MESSAGES[low : low + 6],
            "ids": [[1, 2, low + i] for i in range(6)],
            "limit": [4, 5, 6, 7, 8, 9],
            "number": [1, 2, 3, 4, 5, 6],
            "heat": [0.5] * 6,
            "ends": [["."]] * 6,
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=3)
    return folder


class Place:
    """A complete job, and jobs over it that differ."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.inputs = write(folder / "in")
        self.output = folder / "out"

    def run(self, changes: dict[str, Any], model: dict[str, str] | None = None) -> int:
        config = from_dict(configuration(self.inputs, self.output, changes))
        identify: Callable[[str], dict[str, str]] = lambda path: model or MODEL  # noqa: E731
        return job.run(config, World(), load_fake if not (self.output / "_SUCCESS").exists() else never, identify)


def never(*_: object, **__: object) -> FakeEngine:
    raise AssertionError("an engine was loaded for a job that is complete or refused")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    assert made.run({}) == 0
    return made


SAMPLING = {
    "max_tokens": [1, 15, 17, 256],
    "min_tokens": [1, 4],
    "temperature": [0.5, 1.0, 100.0],
    "top_k": [1, 40],
    "top_p": [0.1, 0.999],
    "min_p": [0.01, 1.0],
    "repetition_penalty": [0.5, 1.1],
    "presence_penalty": [-1.0, 0.1],
    "frequency_penalty": [-0.5, 2.0],
    "seed": [1, 2**63 - 1],
    "n": [2, 3],
    "stop": [["."], ["\n\n", "User:"], [" "]],
    "stop_token_ids": [[0], [5, 6]],
    "ignore_eos": [True],
    "logprobs": [0, 5],
    "prompt_logprobs": [0],
    "best_of": [2],
    "beam_width": [2],
    "length_penalty": [0.5],
    "logit_bias": [{5: 1.5}],
    "allowed_token_ids": [[5, 6]],
    "bad_words": [["no"]],
    "include_stop": [True],
    "skip_special_tokens": [False],
    "truncate_prompt_tokens": [3],
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({f"sampling.{name}": value}, f"sampling.{name}") for name, values in SAMPLING.items() for value in values),
    *(({"input.prompt_column": name}, "input.prompt_column") for name in ("question",)),
    ({"input.messages_column": "messages"}, "input.messages_column"),
    ({"input.token_ids_column": "ids"}, "input.token_ids_column"),
    ({"input.template": "{{ prompt }}"}, "input.template"),
    ({"input.template": "Q: {{ question }}"}, "input.template"),
    ({"input.columns": []}, "input.columns"),
    ({"input.columns": ["prompt"]}, "input.columns"),
    ({"input.columns": ["question", "prompt"]}, "input.columns"),
    *(
        ({"input.sampling_columns": {name: column}}, f"input.sampling_columns.{name}")
        for name, column in (
            ("max_tokens", "limit"),
            ("max_tokens", "number"),
            ("temperature", "heat"),
            ("top_p", "heat"),
            ("top_k", "number"),
            ("seed", "number"),
            ("n", "number"),
            ("stop", "ends"),
            ("stop_token_ids", "ids"),
            ("min_tokens", "number"),
        )
    ),
    ({"output.prefix": "model_"}, "output.prefix"),
    ({"output.prefix": "x"}, "output.prefix"),
    ({"output.token_ids": True}, "output.token_ids"),
    ({"sampling.detokenize": False, "output.token_ids": True}, "sampling.detokenize"),
    ({"output.reasoning": "auto"}, "output.reasoning"),
    ({"engine.max_model_len": 100}, "engine.max_model_len"),
    ({"engine.max_model_len": 101}, "engine.max_model_len"),
]


@pytest.mark.feature("job", "changed input, model, template or sampling: refused with field, planned and new value")
@pytest.mark.parametrize(("changes", "field"), REFUSED, ids=[f"{next(iter(c.items()))}" for c, _ in REFUSED])
def test_a_changed_setting_is_refused_by_name(changes: dict[str, Any], field: str, place: Place) -> None:
    refusal(place, field, changes)


def refusal(
    place: Place, field: str, changes: dict[str, Any] | None = None, model: dict[str, str] | None = None
) -> str:
    before = {path: path.read_bytes() for path in place.output.rglob("*") if path.is_file()}
    with pytest.raises(JobError) as caught:
        place.run(changes or {}, model)
    assert caught.value.exit_code == ExitCode.MISMATCH
    lines = [line for line in str(caught.value).splitlines() if line.startswith(f"{field} ")]
    assert len(lines) == 1, f"{field} is not named in:\n{caught.value}"
    planned, now = (part.strip() for part in lines[0].split(" | ")[1:])
    assert planned != now
    assert before == {path: path.read_bytes() for path in place.output.rglob("*") if path.is_file()}
    tally["changed settings and inputs, refused by name"] += 1
    return str(caught.value)


@pytest.mark.parametrize("part", MODEL)
def test_another_model_is_refused(part: str, place: Place) -> None:
    refusal(place, f"model.{part}", model=MODEL | {part: "another"})


def test_a_model_with_one_digest_less_is_refused(place: Place) -> None:
    refusal(place, "model.tokenizer", model={k: v for k, v in MODEL.items() if k != "tokenizer"})


def edit_a_row(folder: Path) -> None:
    table = pq.read_table(folder / "a.parquet")
    texts = ["another", *table["prompt"].to_pylist()[1:]]
    pq.write_table(table.set_column(0, "prompt", [texts]), folder / "a.parquet", row_group_size=3)


def drop_a_row(folder: Path) -> None:
    pq.write_table(pq.read_table(folder / "a.parquet").slice(1), folder / "a.parquet", row_group_size=3)


def other_row_groups(folder: Path) -> None:
    pq.write_table(pq.read_table(folder / "a.parquet"), folder / "a.parquet", row_group_size=2)


def other_compression(folder: Path) -> None:
    pq.write_table(pq.read_table(folder / "a.parquet"), folder / "a.parquet", row_group_size=3, compression="zstd")


def rename_a_column(folder: Path) -> None:
    table = pq.read_table(folder / "a.parquet")
    names = ["prompt", "question", "messages", "ids", "limit", "number", "heat", "stops"]
    for name in ("a", "b"):
        table = pq.read_table(folder / f"{name}.parquet").rename_columns(names)
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=3)


def exchange(folder: Path) -> None:
    (folder / "a.parquet").rename(folder / "c")
    (folder / "b.parquet").rename(folder / "a.parquet")
    (folder / "c").rename(folder / "b.parquet")


def empty_one(folder: Path) -> None:
    pq.write_table(pq.read_table(folder / "b.parquet").slice(0, 0), folder / "b.parquet")


INPUTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a row edited": (edit_a_row, "input file a.parquet"),
    "a row less": (drop_a_row, "input file a.parquet"),
    "other row groups": (other_row_groups, "input file a.parquet"),
    "written with another compression": (other_compression, "input file a.parquet"),
    "a column renamed": (rename_a_column, "input file b.parquet"),
    "two files exchanged": (exchange, "input file a.parquet"),
    "a file without its rows": (empty_one, "input file b.parquet"),
    "a file more": (lambda f: shutil.copy(f / "a.parquet", f / "c.parquet"), "input file c.parquet"),
    "a file before the others": (lambda f: shutil.copy(f / "a.parquet", f / "0.parquet"), "input file 0.parquet"),
    "a file less": (lambda f: (f / "b.parquet").unlink(), "input file b.parquet"),
    "a file renamed": (lambda f: (f / "b.parquet").rename(f / "z.parquet"), "input file z.parquet"),
    "a file in a folder": (
        lambda f: (
            (f / "sub").mkdir(),
            shutil.move(f / "b.parquet", f / "sub" / "b.parquet"),
        ),
        "input file sub/b.parquet",
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_changed_input_is_refused(name: str, place: Place) -> None:
    change, field = INPUTS[name]
    change(place.inputs)
    refusal(place, field)


def test_a_changed_template_file_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path)
    template = tmp_path / "ask.jinja"
    template.write_text("Q: {{ prompt }}")
    changes = {"input.template": str(template)}
    assert place.run(changes) == 0
    for text in ("Q: {{ prompt }} ", "q: {{ prompt }}", "Q: {{ question }}"):
        template.write_text(text)
        refusal(place, "input.template", changes)


HARMLESS: list[dict[str, Any]] = [
    *({"engine.max_slots": n} for n in (1, 2, 64)),
    *({"engine.threads": n} for n in (1, 4)),
    *({"engine.page_size": n} for n in (1, 32)),
    *({"engine.num_pages": n} for n in (10, 1000)),
    {"engine.kv_cache_gb": 1.5},
    *({"engine.max_step_tokens": n} for n in (256, 4096)),
    {"engine.prefix_cache": False},
    *({"engine.expected_share": share} for share in (0.25, 1.0)),
    *({"job.max_error_fraction": share} for share in (0.0, 1.0)),
    *({"job.progress_seconds": seconds} for seconds in (0.5, 600.0)),
    *({"output.rows_per_chunk": rows} for rows in (1, 3, 1024)),
    *({"output.compression": name} for name in ("snappy", "none", "gzip", "lz4")),
    *({"cluster.mpi": mode} for mode in ("off", "on")),
    *({"engine.device": device} for device in ("cpu", "reference")),
    {"engine.dtype": "fp32"},
    {"bench.rows": 5},
    {"bench.repeat": 3},
    {"engine.max_slots": 3, "output.rows_per_chunk": 7, "output.compression": "none", "job.progress_seconds": 1.0},
]


@pytest.mark.parametrize("half_done", [False, True])
@pytest.mark.parametrize("changes", HARMLESS, ids=str)
@pytest.mark.feature("job", "a resume may change ranks, slots, memory, chunk size, compression, limits and paths")
def test_what_does_not_change_the_results_is_accepted(changes: dict[str, Any], half_done: bool, tmp_path: Path) -> None:
    place = Place(tmp_path)
    if half_done:
        config = from_dict(configuration(place.inputs, place.output, {"output.rows_per_chunk": 3}))
        with pytest.raises(JobError, match="went away"):
            job.run(config, World(), _failing, lambda path: MODEL)
    else:
        assert place.run({}) == 0
    assert place.run(changes) == 0
    assert len(pq.read_table(sorted(place.output.glob("part-*")))) == len(TEXTS)
    tally["harmless changes, accepted"] += 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"engine.dtype": "fp32"}, "engine.dtype"),
        ({"engine.device": "reference"}, "engine.device"),
        ({"engine.device": "cpu"}, "engine.device"),
        ({"engine.ops": "native"}, "engine.ops"),
        ({"engine.weights": "int8"}, "engine.weights"),
    ],
)
@pytest.mark.feature("job", "another device, dtype or version: noted in the parts, refused with job.strict_resume")
def test_what_changes_results_slightly_is_noted_or_refused(
    changes: dict[str, Any], field: str, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    assert place.run(changes) == 0
    assert f"{field} " in capfd.readouterr().err
    refusal(place, field, changes | {"job.strict_resume": True})
    assert place.run({"job.strict_resume": True}) == 0
    part = pq.read_metadata(sorted(place.output.glob("part-*"))[0]).metadata[b"batchinfer"]
    assert json.loads(part)["provenance"]["numeric"]["engine"] == dict.fromkeys(("device", "dtype", "ops"), "auto")


def test_another_version_is_noted_or_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fingerprint, "__version__", "99.0")
    assert place.run({}) == 0
    assert '-> "99.0"' in capfd.readouterr().err
    refusal(place, "batchinfer", {"job.strict_resume": True})


def _failing(*_: object, **__: object) -> FakeEngine:
    return FakeEngine(slots=2, fail_at_step=14)


@pytest.mark.parametrize("how", ["moved", "linked", "named by a glob", "by another name of the model"])
def test_another_path_to_the_same_is_accepted(how: str, place: Place) -> None:
    changes: dict[str, Any] = {}
    if how == "moved":
        place.inputs = place.inputs.rename(place.folder / "elsewhere")
        place.output = place.output.rename(place.folder / "results")
    elif how == "linked":
        (place.folder / "link").symlink_to(place.inputs)
        place.inputs = place.folder / "link"
    elif how == "named by a glob":
        place.inputs = place.inputs / "*.parquet"
    else:
        changes = {"model.path": "/another/place"}
    assert place.run(changes) == 0
    tally["harmless changes, accepted"] += 1


def test_there_are_enough_cases() -> None:
    assert len(REFUSED) + len(INPUTS) + len(MODEL) >= 60
    assert len(HARMLESS) + 4 >= 30
