"""The command line as a user meets it: overrides, mistakes, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from batchinfer.__main__ import COMMANDS, compose, config_folder, main
from batchinfer.config import to_dict
from batchinfer.types import ExitCode


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main([*argv]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.err.startswith("batchinfer: error: ")
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.feature("commands", "an unknown key or wrong value names the key, its file and what is allowed")
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sampling.temprature=1", ["no key 'sampling.temprature'", "'sampling.temperature'", "sampling/default.yaml"]),
        ("+sampling.foo=1", ["no key 'sampling.foo'", "sampling has max_tokens, min_tokens", "sampling/default.yaml"]),
        ("smpling.top_k=1", ["no key 'smpling.top_k'", "did you mean 'sampling.top_k'?", "config.yaml"]),
        ("job.max_error=1", ["no key 'job.max_error'", "max_error_fraction", "config.yaml"]),
        ("foo=1", ["no key 'foo'", "config.yaml"]),
        ("~sampling.n=1", ["no key '~sampling.n'", "did you mean 'sampling.n'?"]),
        ("sampling.temperature=hot", ["sampling.temperature=hot is not allowed", "takes a number", "default.yaml"]),
        ("sampling.top_k=1.5", ["sampling.top_k=1.5 is not allowed", "takes a whole number"]),
        ("sampling.ignore_eos=2.5", ["sampling.ignore_eos=2.5 is not allowed", "takes true or false"]),
        ("sampling.stop=END", ["sampling.stop=END is not allowed", "takes a list of texts, as in [one,two]"]),
        ("sampling.stop_token_ids=[1,x]", ["sampling.stop_token_ids=[1,x] is not allowed", "list of whole numbers"]),
        ("input.columns=all", ["input.columns=all is not allowed", "list of texts", "or null"]),
        ("input.path=null", ["input.path=null is not allowed", "takes a text"]),
        ("engine.max_slots=", ["engine.max_slots= is not allowed", "a whole number in [1, 65536]"]),
        ("sampling.max_tokens=1,2", ["sampling.max_tokens=1,2 is not understood", "takes a whole number"]),
        ("input.columns=[a,b(c]", ["is not understood", "needs quotes of its own"]),
        ("input.path=${nowhere}", ["input.path", "Interpolation key 'nowhere' not found"]),
        ("sampling=gredy", ["sampling=gredy is not allowed", "default, greedy, nucleus", "did you mean 'greedy'?"]),
        ("model=/models/x.gguf", ["model=/models/x.gguf is not allowed", "write model.path=/models/x.gguf"]),
        ("prompts.parquet", ["'prompts.parquet' is not understood", "key=value"]),
        ("sampling.temperature=-1", ["sampling.temperature=-1.0 is not allowed", "[0, 100]"]),
    ],
)
def test_a_wrong_override_names_key_file_and_what_is_allowed(
    override: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(capsys, "run", "model.path=m", "input.path=i", "output.path=o", override)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["rnu"], "no command 'rnu', did you mean 'run'?"),
        (["run", "--cfg"], "--cfg"),
        (["run", "--speed"], "--speed"),
        (["run", "--config-dir", "/nonexistent"], "/nonexistent"),
        (["run"], "model.path, input.path, output.path: missing"),
        (["plan"], "give input.path=PATH"),
        (["status"], "give output.path=PATH"),
        (["bench", "model.path=m"], "give input.path=PATH"),
        (["doctor", "x=1"], "x=1"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(argv: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert part in error_of(capsys, *argv)


VERBATIM = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda text: text[0] not in "'\"" and text != "null" and "${" not in text
)


@settings(max_examples=12)
@given(st.lists(VERBATIM, min_size=5, max_size=5))
def test_a_text_key_takes_any_text_as_it_stands(texts: list[str]) -> None:
    keys = ["model.path", "input.path", "input.prompt_column", "output.path", "output.prefix"]
    config = compose([f"{key}={text}" for key, text in zip(keys, texts, strict=True)])
    composed = [config.model.path, config.input.path, config.input.prompt_column, config.output.path]
    assert [*composed, config.output.prefix] == texts


def test_values_that_users_write() -> None:
    config = compose(
        [
            "input.path=/data/a b/lang=de,x/übung(1)[2].parquet",
            "output.path='quoted path'",
            "input.template=Q: {{ question }}\\n'A':",
            "input.columns=[id,'a, b']",
            "input.sampling_columns.max_tokens=limit",
            "++input.sampling_columns={temperature:temp}",
            "model.adapters={law: some/where}",
            "model.adapters.code=else/where",
            'sampling.stop=["\\n\\n","a=b, c"]',
            "sampling.stop_token_ids=[1,2]",
            "sampling.logprobs=null",
            "input.messages_column=null",
            "cluster.mpi=off",
        ]
    )
    assert config.input.path == "/data/a b/lang=de,x/übung(1)[2].parquet"
    assert config.output.path == "quoted path"
    assert config.input.template == "Q: {{ question }}\n'A':"
    assert config.input.columns == ["id", "a, b"]
    assert config.input.sampling_columns == {"max_tokens": "limit", "temperature": "temp"}
    assert config.model.adapters == {"law": "some/where", "code": "else/where"}
    assert config.sampling.stop == ("\n\n", "a=b, c")
    assert config.sampling.stop_token_ids == (1, 2)
    assert (config.sampling.logprobs, config.input.messages_column, config.cluster.mpi) == (None, None, "off")


def test_interpolation_works_inside_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHINFER_TEST_SCRATCH", "/scratch/a b")
    assert compose(["output.path=${oc.env:BATCHINFER_TEST_SCRATCH}/out"]).output.path == "/scratch/a b/out"


@pytest.mark.feature("commands", "Hydra overrides, groups of one's own, --cfg job; no folders left behind")
def test_groups_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my, configs ü"
    (folder / "sampling").mkdir(parents=True)
    (folder / "site").mkdir()
    (folder / "sampling" / "mine.yaml").write_text("defaults: [default, _self_]\ntemperature: 0.3\n")
    (folder / "sampling" / "bad.yaml").write_text("temprature: 0.3\n")
    (folder / "site" / "big.yaml").write_text("# @package _global_\nengine:\n  max_slots: 512\nsampling:\n  n: 2\n")
    (folder / "site" / "local.yaml").write_text("max_slots: 512\n")

    config = compose(["sampling=mine", "+site=big", "sampling.top_k=5"], folder)
    assert (config.sampling.temperature, config.sampling.top_k, config.sampling.n) == (0.3, 5, 2)
    assert config.engine.max_slots == 512
    paths = ["model.path=m", "input.path=i", "output.path=o", "--config-dir", str(folder)]
    message = error_of(capsys, "run", "sampling=bad", *paths)
    assert "temprature" in message
    assert "sampling/default.yaml" in message
    assert "mine" in error_of(capsys, "run", "sampling=nine", *paths)
    assert "# @package _global_" in error_of(capsys, "run", "+site=local", *paths)


@pytest.mark.feature("commands", "Hydra overrides, groups of one's own, --cfg job; no folders left behind")
def test_cfg_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--cfg", "job", "sampling=greedy", "model.path=m.gguf", "output.path=${model.path}.out"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.output.path == "m.gguf.out"
    assert OmegaConf.to_container(printed) == to_dict(compose(["model.path=m.gguf", "output.path=m.gguf.out"]))


@pytest.mark.feature("commands", "Hydra overrides, groups of one's own, --cfg job; no folders left behind")
def test_composing_leaves_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--cfg", "job"]) == 0
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=lambda a: a[0])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "usage: batchinfer" in capsys.readouterr().out


def test_an_mpi_mode_in_a_file_comes_too_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "alone.yaml").write_text('mpi: "off"\n')
    argv = ["run", "model.path=m", "input.path=i", "output.path=o", "cluster=alone", "--config-dir", str(tmp_path)]
    assert "give it on the command line" in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (KeyboardInterrupt(), ExitCode.INCOMPLETE, "the same command again goes on from here"),
        (RuntimeError("broken invariant"), ExitCode.INTERNAL, "RuntimeError: broken invariant"),
    ],
)
def test_what_no_one_foresaw_has_an_exit_code(
    raised: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(paths: list[str], as_json: bool) -> int:
        raise raised

    monkeypatch.setattr("batchinfer.doctor.main", fail)
    assert main(["doctor"]) == code
    assert text in capsys.readouterr().err


def test_one_value_of_the_configuration_is_printed_bare(capsys: pytest.CaptureFixture[str]) -> None:
    """slurm/run.sh reads cluster.srun so."""
    assert main(["run", "cluster=frontier", "--cfg", "cluster.srun"]) == 0
    assert capsys.readouterr().out == "--gpus-per-task=1 --gpu-bind=closest\n"
    assert "did you mean 'cluster.srun'?" in error_of(capsys, "run", "--cfg", "cluster.srn")


@pytest.mark.parametrize("site", [path.stem for path in (config_folder() / "cluster").glob("*.yaml")])
def test_the_presets_of_the_centres_are_configurations(site: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", f"cluster={site}", "--cfg", "job"]) == 0
    assert "mpi: auto" in capsys.readouterr().out


def test_status_code_says_with_its_exit_code_what_came_of_a_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"model.path={tmp_path}/none", f"input.path={tmp_path}/none", f"output.path={tmp_path}/out"]
    assert main(["status", *paths, "--code"]) == ExitCode.LOST_RANK  # nothing is there
    monkeypatch.setenv("BATCHINFER_LAUNCH", str(tmp_path / "launch"))
    assert main(["status", *paths, "--code"]) == ExitCode.LOST_RANK
    assert main(["run", *paths]) == ExitCode.INPUT
    assert main(["status", *paths, "--code"]) == ExitCode.INPUT
    assert capsys.readouterr().out == ""
