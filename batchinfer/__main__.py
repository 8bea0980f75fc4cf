"""The command line: options, Hydra composition of the configuration, dispatch, exit codes.

torch, pyarrow and MPI are imported by the commands that need them, inside the functions: help, status and verify work
on a login node without any of them compiled or fast.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from batchinfer import __version__
from batchinfer.cluster import signals
from batchinfer.cluster.launch import launch_name, note_failure, noted_failure
from batchinfer.cluster.world import World, join, launcher, outside
from batchinfer.config import Config, allowed, from_dict, items, to_dict, type_of
from batchinfer.rules import REQUIRED, check
from batchinfer.types import ExitCode, JobError, exit_code


@dataclass(frozen=True)
class Command:
    """``needs``: the keys without which the command can't do its work."""

    summary: str
    needs: tuple[str, ...]


COMMANDS = {
    "run": Command("do the job, or what is missing of it; alone, or under srun/mpiexec on many ranks", REQUIRED),
    "plan": Command("show what run would do, and given model.path what it will cost; writes nothing", ("input.path",)),
    "status": Command("say how much of a job is done, from its output folder alone", ("output.path",)),
    "verify": Command("read every part of a job's output again and check it", ("output.path",)),
    "compact": Command("merge a finished job's parts into larger files elsewhere", ("output.path", "compact.path")),
    "convert": Command(
        "make a Parquet input of JSON lines, OpenAI batch requests or a datasets folder", ("input.path", "convert.path")
    ),
    "export": Command("write a finished job's rows as JSON lines or OpenAI results", ("output.path", "export.path")),
    "bench": Command("time the engine on the rows of the input, or on bench.workload", ("model.path",)),
    "bundle": Command("compile the Triton kernels ahead, for GPUs that are not here", ("model.path", "bundle.path")),
    "doctor": Command("say what this installation and this node can do, and what to repair", ()),
}

MAPPINGS = tuple(key for key, _ in items() if type_of(key).startswith("dict"))

ESCAPED = ("sampling.stop", "input.template", "rerank.template")
"""Keys in which, on the command line, \\n and \\t mean what they do in a quoted YAML text."""

EXAMPLE = "batchinfer run model.path=DIR|FILE.gguf input.path=prompts.parquet output.path=OUT sampling.max_tokens=64"


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code (types.ExitCode). Every failure of a rank ends the whole MPI job with its code."""
    arguments = sys.argv[1:] if argv is None else argv
    running = arguments[:1] == ["run"]
    if running:
        signals.install()
    world = outside()
    try:
        name, options = parse(arguments)
        if name != "run" and launcher().rank != 0:
            return ExitCode.COMPLETE
        if name == "doctor":
            from batchinfer import doctor

            return doctor.main(options.paths, options.json)
        if options.cfg:
            return _print_config(options) if launcher().rank == 0 else ExitCode.COMPLETE
        if name == "run":
            world = join(_mpi_mode(options.overrides))
            signals.install()
        config = _shared_config(name, options, world)
        return _dispatch(name, options, config, world)
    except BaseException as error:
        code = _report(error, world)
        if running:
            note_failure(code)
        world.abort(code)
        return code


def _dispatch(name: str, options: argparse.Namespace, config: Config, world: World) -> int:
    if name == "bench":
        from batchinfer import bench

        return bench.main(config)
    if name == "bundle":
        from batchinfer.engine import bundle

        return bundle.main(config)
    if name == "run":
        from batchinfer import job

        return job.run(config, world)
    from batchinfer import inquire

    if name == "status" and options.code:
        return inquire.show_code(config, launch_name(), noted_failure())
    if name == "plan":
        return inquire.show_plan(config, options.time)
    commands = {
        "status": inquire.show_status,
        "verify": inquire.show_verify,
        "compact": inquire.run_compact,
        "convert": inquire.run_convert,
        "export": inquire.run_export,
    }
    return commands[name](config)


def _report(error: BaseException, world: World) -> int:
    """Say on standard error what went wrong; the exit code that belongs to it."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):  # argparse has printed its help
        return error.code
    if isinstance(error, JobError):
        print(f"batchinfer: error:{world.place} {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print(f"batchinfer: interrupted{world.place}: the same command again goes on from here", file=sys.stderr)
    else:
        print(f"batchinfer: internal error{world.place}", file=sys.stderr)
        traceback.print_exception(type(error), error, error.__traceback__)
    return exit_code(error)


# Options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise JobError(f"{message}\n{self.format_usage().strip()}", ExitCode.USAGE)


def parse(argv: list[str]) -> tuple[str, argparse.Namespace]:
    """Command name and options. SystemExit(0) after help or version; JobError(64) for what can't be understood."""
    top = _Parser("batchinfer", usage="batchinfer COMMAND [key=value ...] [options]", allow_abbrev=False)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    top.description = "Offline LLM batch inference: Parquet in, Parquet out, one output row per input row."
    lines = [f"  {name:8} {command.summary}" for name, command in COMMANDS.items()]
    top.epilog = "\n".join(["commands:", *lines, "", "for example:", f"  {EXAMPLE}", "", _where_keys_are()])
    top.add_argument("--version", action="version", version=f"batchinfer {__version__}")
    top.add_argument("command", help=argparse.SUPPRESS)
    if not argv:
        top.print_help()
        raise SystemExit(ExitCode.USAGE)
    name = top.parse_args(argv[:1]).command
    if name not in COMMANDS:
        guess = _did_you_mean(name, list(COMMANDS))
        raise JobError(f"there is no command {name!r}{guess}; there are {', '.join(COMMANDS)}", ExitCode.USAGE)
    return name, _command_parser(name).parse_intermixed_args(argv[1:])


def _command_parser(name: str) -> argparse.ArgumentParser:
    parser = _Parser(f"batchinfer {name}", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = COMMANDS[name].summary
    if name == "doctor":
        parser.add_argument("paths", nargs="*", metavar="PATH", help="say also on which file system this lies")
        parser.add_argument("--json", action="store_true", help="the same for programs")
        return parser
    parser.usage = f"batchinfer {name} [key=value ...] [--cfg job] [--config-dir DIR]"
    needs = "".join(f"  {key}=PATH\n" for key in COMMANDS[name].needs)
    parser.epilog = f"required:\n{needs}\n{_where_keys_are()}"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a setting, or group=option")
    parser.add_argument(
        "--cfg", metavar="job|KEY", help="print the resulting configuration as YAML, or one value of it, and do no more"
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with groups of your own")
    if name == "plan":
        text = "also load the model, compute a sample of the rows, and say how long the job takes"
        parser.add_argument("--time", action="store_true", help=text)
    if name == "status":
        text = "print nothing: the exit code is that of the finished job, or of the newest attempt at it"
        parser.add_argument("--code", action="store_true", help=text)
    return parser


def _where_keys_are() -> str:
    groups = "\n".join(f"  {group:9} {', '.join(_options(group, None))}" for group in _groups(None))
    return f"groups and their options, with all keys explained in {config_folder()}:\n{groups}"


# Configuration


def config_folder() -> Path:
    """The YAML files that come with the program: inside the installed package, or beside it in the source tree."""
    package = Path(__file__).resolve().parent
    return next(f for f in (package / "configs", package.parent / "configs") if (f / "config.yaml").is_file())


def compose(overrides: list[str], config_dir: Path | None = None) -> Config:
    """The configuration that the files and the overrides give; not yet checked across keys.

    Raises JobError(64) naming the key or group, the file that explains it, and what is allowed.
    """
    if config_dir and not config_dir.is_dir():
        raise JobError(f"--config-dir {config_dir}: there is no such folder", ExitCode.USAGE)
    prepared = [_prepare(override, config_dir) for override in overrides]
    if config_dir:
        prepared.append(f"hydra.searchpath=[{_quoted('file://' + str(config_dir.resolve()))}]")
    return from_dict(_hydra_compose(prepared))


def _hydra_compose(overrides: list[str]) -> dict[str, Any]:
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        try:
            sweep = OverridesParser.create().parse_override(override).is_sweep_override()
        except HydraException as error:
            raise _bad_grammar(override, str(error).split("\n")[0]) from None
        if sweep:
            raise _bad_grammar(override, "one value is wanted")
    ConfigStore.instance().store("schema", _writable(OmegaConf.structured(Config)))
    try:
        with warnings.catch_warnings(), hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            warnings.simplefilter("ignore")
            return OmegaConf.to_container(hydra.compose("config", overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explained(error, overrides) from error


def _writable(node: Any) -> Any:
    """Take away the read-only mark that a frozen dataclass gives its node: composing is writing."""
    from omegaconf import OmegaConf

    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if OmegaConf.is_config(child) and not (child._is_none() or child._is_missing()):
            _writable(child)
    return node


def _prepare(override: str, config_dir: Path | None) -> str:
    """Check the left side of an override, and quote the right side of a text key, so that any path is taken as it is.

    Hydra's own grammar stops at "=", ",", blanks, brackets and letters beyond ASCII; lists and mappings keep it.
    """
    left, equals, value = override.partition("=")
    key = left.lstrip("+")
    if not equals:
        raise JobError(f"{override!r} is not understood: settings are given as key=value", ExitCode.USAGE)
    if key.startswith("hydra.") or key in _groups(config_dir):
        if key in _groups(config_dir):
            _check_option(key, value, config_dir)
        return override
    if key.startswith(MAPPINGS):  # their keys are new ones each time
        return f"++{key}={value}"
    try:
        kind = type_of(key)
    except KeyError:
        raise _unknown_key(override, key) from None
    if key in ESCAPED:
        value = re.sub(r"\\([nt])", lambda match: {"n": "\n", "t": "\t"}[match[1]], value)
    verbatim = kind.startswith("str") and value != "null" and value[:1] not in ("'", '"')
    return f"{left}={_quoted(value) if verbatim else value}"


def _quoted(text: str) -> str:
    """A quoted value of Hydra's grammar; a backslash is doubled only where it stands before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def _groups(config_dir: Path | None) -> list[str]:
    folders = [config_folder(), *([config_dir] if config_dir else [])]
    return sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})


def _options(group: str, config_dir: Path | None) -> list[str]:
    folders = [config_folder(), *([config_dir] if config_dir else [])]
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _check_option(group: str, option: str, config_dir: Path | None) -> None:
    known = _options(group, config_dir)
    if option in known:
        return
    hint = _did_you_mean(option, known)
    if f"{group}.path" in dict(items()) and ("/" in option or "." in option):
        hint = f"; to name the {group}'s path write {group}.path={option}"
    raise JobError(
        f"{group}={option} is not allowed: {group} has the options {', '.join(known)} "
        f"(files in {config_folder() / group}){hint}",
        ExitCode.USAGE,
    )


def _unknown_key(subject: str, key: str) -> JobError:
    section = key.partition(".")[0]
    names = [name.partition(".")[2] for name, _ in items() if name.startswith(section + ".")]
    guess = _did_you_mean(key, [*(name for name, _ in items()), *_groups(None)])
    listing = f"; {section} has {', '.join(names)}" if names else ""
    return JobError(f"{subject}: there is no key {key!r}{guess}{listing} (see {_file_of(key)})", ExitCode.USAGE)


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _file_of(key: str) -> Path:
    """The file that explains a key and its neighbours."""
    section = config_folder() / key.partition(".")[0] / "default.yaml"
    return section if section.is_file() else config_folder() / "config.yaml"


def _bad_grammar(override: str, reason: str) -> JobError:
    key = override.partition("=")[0].lstrip("+")
    wanted = f"{key} takes {allowed(key)}" if key in dict(items()) else f"{key} takes one name"
    quotes = """an element with , : = quotes, brackets or blanks in it needs quotes of its own: "key=['a, b','c']" """
    return JobError(f"{override} is not understood ({reason}): {wanted}; {quotes.strip()}", ExitCode.USAGE)


def _explained(error: BaseException, overrides: list[str]) -> JobError:
    """Hydra's error as one message: the innermost cause names the key, the schema knows what it may hold."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    key = next((k for c in reversed(causes) if (k := getattr(c, "full_key", None))), "").partition("[")[0]
    reason = str(causes[-1]).split("\n")[0].rstrip(".")
    known = dict(items())
    if key not in known and key.rpartition(".")[0] in known:  # a key of a mapping
        key = key.rpartition(".")[0]
    if key not in known:
        if not key:
            return JobError(str(error), ExitCode.USAGE)
        hint = "" if "." in key else " (a file for several sections begins with the line `# @package _global_`)"
        return _unknown_key(f"in a configuration file{hint}", key)
    given = [o for o in overrides if o.lstrip("+").startswith(f"{key}=")]
    subject = f"{given[-1]} is not allowed" if given else f"{key}: {reason}"
    if "nterpolation" in reason:
        subject = f"{key}: {reason}"
    return JobError(f"{subject}: {key} takes {allowed(key)} ({_file_of(key)})", ExitCode.USAGE)


def _print_config(options: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    config = compose(options.overrides, options.config_dir)
    if options.cfg == "job":
        print(OmegaConf.to_yaml(to_dict(config)), end="")
    elif options.cfg in dict(items()):
        print(dict(items(config))[options.cfg])
    else:
        raise _unknown_key(f"--cfg {options.cfg}", options.cfg)
    return ExitCode.COMPLETE


def _mpi_mode(overrides: list[str]) -> str:
    """cluster.mpi, which is needed before rank 0 reads any file."""
    given = [value for key, _, value in (o.lstrip("+").partition("=") for o in overrides) if key == "cluster.mpi"]
    return given[-1].strip("'\"") if given else "auto"


def _shared_config(name: str, options: argparse.Namespace, world: World) -> Config:
    """Composed and checked on rank 0, the same on all."""
    text = None
    if world.rank == 0:
        config = compose(options.overrides, options.config_dir)
        needs = COMMANDS[name].needs
        if name == "bench" and config.bench.workload == "none":
            needs += ("input.path",)
        check(config, needs)
        if name == "run" and config.cluster.mpi != _mpi_mode(options.overrides):
            value = config.cluster.mpi
            raise JobError(f"cluster.mpi={value} in a file comes too late: give it on the command line", ExitCode.USAGE)
        text = json.dumps(to_dict(config) | {"sampling": _with_texts(to_dict(config)["sampling"])})
    return from_dict(json.loads(world.bcast(text)))


def _with_texts(sampling: dict[str, Any]) -> dict[str, Any]:
    """The values that name a file become its text, which is what a job is planned with."""
    texts = {}
    for key, endings in (("json_schema", (".json",)), ("grammar", (".lark", ".gbnf"))):
        if sampling[key].endswith(endings):
            try:
                texts[key] = Path(sampling[key]).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                text = f"sampling.{key}={sampling[key]} cannot be read: {error}"
                raise JobError(text, ExitCode.USAGE) from None
    return sampling | texts


if __name__ == "__main__":
    sys.exit(main())
