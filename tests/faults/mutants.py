"""Do the tests have teeth? Each mutant takes one safeguard out of a copy of the package; a test must notice.

python tests/faults/mutants.py [name ...]    one line per mutant; exit code 1 if one survives
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "batchinfer"


@dataclass(frozen=True)
class Mutant:
    """``old`` stands once in ``file`` and becomes ``new``; one of ``tests`` must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: str


ORDER = "faults/test_order.py"
MUTANTS = [
    Mutant(
        "no fsync of a file",
        "data/commit.py",
        "            os.fsync(fd)\n        except Base",
        "            pass\n        except Base",
        ORDER,
    ),
    Mutant(
        "no fsync of the folder", "data/commit.py", "        sync_folder(os.path.dirname(final))", "        pass", ORDER
    ),
    Mutant("no reading back", "data/ledger.py", "                decode_part(read_bytes(temporary))\n", "", ORDER),
    Mutant(
        "publication may replace",
        "data/commit.py",
        'return {"link": os.link, "renameat2": _rename_no_replace, "symlink": _claim_and_rename}',
        'return {"link": os.replace}',
        "data/test_commit.py",
    ),
    Mutant(
        "a lost reply is taken for a failure",
        "data/commit.py",
        "            if _has_happened(ours, temporary, final):\n                return True\n",
        "",
        "data/test_commit.py",
    ),
    Mutant(
        "a failed file is synced again",
        "data/ledger.py",
        "for attempt in range(TRIES):",
        "for attempt in range(1):",
        "data/test_ledger.py",
    ),
    Mutant(
        "a failed file is left behind",
        "data/commit.py",
        "        remove(path)\n        raise",
        "        raise",
        "data/test_commit.py",
    ),
    Mutant(
        "temporary names are seen by readers",
        "data/ledger.py",
        'f".{stem}.{self._attempt}',
        'f"{stem}.{self._attempt}',
        ORDER,
    ),
    Mutant("no page CRC", "data/part.py", "write_page_checksum=True", "write_page_checksum=False", "data/test_part.py"),
    Mutant(
        "no digest of the bytes",
        "data/part.py",
        "    if _digest_around(data, place) != data",
        "    if False and data",
        "data/test_part.py",
    ),
    Mutant(
        "no digest of the values",
        "data/part.py",
        "    if content_digest(table) != info.content:",
        "    if False:",
        "data/test_part.py",
    ),
    Mutant(
        "no look at a part's identity",
        "data/ledger.py",
        "            check_identity(info, self.plan, chunk)\n",
        "",
        "data/test_ledger.py",
    ),
    Mutant(
        "_SUCCESS without looking for the parts",
        "data/ledger.py",
        '        if missing:\n            shown = ", ".join(missing[:5])',
        '        if False:\n            shown = ", ".join(missing[:5])',
        "data/test_ledger.py",
    ),
    Mutant(
        "_SUCCESS is not compared",
        "data/audit.py",
        "        bad = _against_success(path, plan, infos) | bad",
        "        pass",
        "data/test_audit.py",
    ),
    Mutant(
        "the plan is not checked for damage",
        "data/plan.py",
        "        if damaged:",
        "        if False:",
        "data/test_plan.py data/test_audit.py",
    ),
    Mutant(
        "differences are not refused",
        "data/ledger.py",
        "    if found:\n        hint =",
        "    if False:\n        hint =",
        "faults/test_settings.py",
    ),
    Mutant(
        "the sampling is not in the fingerprint",
        "fingerprint.py",
        '        "sampling": json.loads(json.dumps(to_dict(config)["sampling"])),',
        "",
        "faults/test_settings.py",
    ),
    Mutant(
        "the model is not in the fingerprint",
        "fingerprint.py",
        '        "model": dict(model),\n',
        "",
        "faults/test_settings.py",
    ),
    Mutant(
        "the columns are not in the fingerprint",
        "fingerprint.py",
        '            "columns": config.input.columns,\n',
        "",
        "faults/test_settings.py",
    ),
    Mutant(
        "a row's settings are not in the fingerprint",
        "fingerprint.py",
        '            "sampling_columns": config.input.sampling_columns,\n',
        "",
        "faults/test_settings.py",
    ),
    Mutant(
        "the length is not in the fingerprint",
        "fingerprint.py",
        '        "engine": {"max_model_len": config.engine.max_model_len},\n',
        "",
        "faults/test_settings.py",
    ),
    Mutant(
        "the template's file name for its text",
        "fingerprint.py",
        "template_text(source.name) if",
        "source.name if",
        "faults/test_settings.py",
    ),
    Mutant(
        "the footer's digest is not in the plan",
        "data/plan.py",
        '    return f"{file.rows} rows, {file.bytes} bytes, footer {file.digest[:12]}{parts}"',
        '    return f"{file.rows} rows{parts}"',
        "faults/test_settings.py",
    ),
    Mutant(
        "an input that changes under way is read",
        "data/reader.py",
        "        if read_footer(file.full_path)[2] != file.digest:",
        "        if False:",
        "data/test_reader.py",
    ),
    Mutant(
        "a row's seed does not depend on the row",
        "data/prompts.py",
        'struct.pack("<QQ", run_seed, row_id)',
        'struct.pack("<QQ", run_seed, 0)',
        "faults/test_races.py",
    ),
    Mutant(
        "a chunk may be committed with a row missing",
        "pipeline.py",
        "        return self.missing == 0",
        "        return self.missing <= 1",
        "faults/test_races.py",
    ),
    Mutant(
        "loops of templates are not counted",
        "sandbox.py",
        "        if self._steps < 0:",
        "        if False:",
        "test_sandbox.py",
    ),
    Mutant(
        "values of templates are not bounded",
        "sandbox.py",
        "        if size > MAX_VALUE or self._work < 0:",
        "        if False:",
        "test_sandbox.py",
    ),
    Mutant(
        "an index may lead out of the model",
        "models/safetensors.py",
        "or not SHARD_NAME.fullmatch(shard)",
        "",
        "faults/test_models.py",
    ),
    Mutant(
        "pipes and devices are read",
        "models/files.py",
        "        if not stat.S_ISREG(info.st_mode):",
        "        if False:",
        "faults/test_models.py",
    ),
    Mutant(
        "damaged journals are read",
        "data/journal.py",
        "if len(payload) == size and zlib.crc32(payload) == payload_crc:",
        "if len(payload) == size:",
        "data/test_journal.py",
    ),
    Mutant(
        "an extension may change what was planned",
        "data/plan.py",
        "    if not fresh or differences(planned, rest):",
        "    if not fresh:",
        "faults/test_append.py",
    ),
    Mutant(
        "a claim is taken without looking for the file",
        "data/commit.py",
        "        if os.path.lexists(final):  # it was",
        "        if False:  # it was",
        "data/test_commit.py",
    ),
]


def survives(mutant: Mutant, folder: Path) -> bool:
    """Whether the mutant's tests pass."""
    copy = folder / "batchinfer"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(TESTS.parent / "configs", folder / "configs")
    path = copy / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} has {source.count(mutant.old)} of {mutant.old!r}")
    path.write_text(source.replace(mutant.old, mutant.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [str(TESTS / test) for test in mutant.tests.split()]
    # Not started in the tree: "python -m" puts the working directory before everything else.
    run = {"env": {**os.environ, "PYTHONPATH": str(folder)}, "cwd": TESTS, "capture_output": True, "text": True}
    where = subprocess.run([sys.executable, "-c", "import batchinfer; print(batchinfer.__file__)"], **run)
    if Path(where.stdout.strip()) != copy / "__init__.py":
        raise SystemExit(f"the tests would import {where.stdout}")
    done = subprocess.run(command, **run)
    if done.returncode not in (0, 1):  # 1: a test failed; anything else says nothing about the mutant
        raise SystemExit(f"{mutant.name}: pytest ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    alive = 0
    for mutant in chosen:
        with tempfile.TemporaryDirectory() as folder:
            survived = survives(mutant, Path(folder))
        alive += survived
        print(f"{'SURVIVES' if survived else 'noticed '} {mutant.name} ({mutant.file}; {mutant.tests})", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants noticed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
