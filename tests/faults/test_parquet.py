"""Damaged Parquet as input: a clear refusal or rows with errors; never a crash, a hang or all of the memory."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import ByteTokenizer
from faults.bounded import Failure, Outcome, bounded
from faults.sizes import SEED, size, tally

from batchinfer.config import InputConfig
from batchinfer.data.columns import check_input, used_columns
from batchinfer.data.plan import make_plan
from batchinfer.data.prompts import PromptBuilder
from batchinfer.data.reader import ChunkReader
from batchinfer.data.tables import input_schema, list_inputs
from batchinfer.types import Completion, ExitCode, JobError, SamplingParams

MUTANTS = size(1500, 30_000)
BATCH = 40  # mutants per forked process
MAX_RSS_MIB = 1024


def seeds() -> dict[str, bytes]:
    """Valid files of many layouts."""
    rng = random.Random(7)
    words = [f"prompt {i} " + "word " * rng.randrange(30) for i in range(200)]
    table = pa.table(
        {
            "prompt": words,
            "number": pa.array([rng.randrange(99) if i % 7 else None for i in range(200)], pa.int64()),
            "nested": [[{"role": "user", "content": w[:20]}] * (i % 3) for i, w in enumerate(words)],
            "word": pa.array([w.split()[0] for w in words]).dictionary_encode(),
        }
    )
    plain = table.select(["prompt", "number"])
    layouts = {
        "plain": (plain, {"compression": "none", "use_dictionary": False}),
        "zstd": (table, {"compression": "zstd"}),
        "snappy": (table, {"compression": "snappy", "row_group_size": 50}),
        "gzip": (plain, {"compression": "gzip", "data_page_version": "2.0"}),
        "lz4": (plain, {"compression": "lz4", "write_page_index": True}),
        "small pages": (table, {"data_page_size": 64, "row_group_size": 70, "write_page_checksum": True}),
        "delta": (
            plain,
            {
                "use_dictionary": False,
                "column_encoding": {"prompt": "DELTA_BYTE_ARRAY", "number": "DELTA_BINARY_PACKED"},
            },
        ),
        "no statistics": (table, {"write_statistics": False, "store_schema": False, "version": "1.0"}),
    }
    made = {}
    for name, (content, options) in layouts.items():
        sink = pa.BufferOutputStream()
        pq.write_table(content, sink, **options)
        made[name] = sink.getvalue().to_pybytes()
    return made


def footer_start(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def flips(low: float, high: float) -> Callable[[bytearray, random.Random], None]:
    """A few flipped bits in a part of the file, as shares of its length before and after the footer's start."""

    def mutate(data: bytearray, rng: random.Random) -> None:
        start = footer_start(bytes(data))
        bounds = [int(x * start) if x <= 1 else start + int((x - 1) * (len(data) - 8 - start)) for x in (low, high)]
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(bounds[0], bounds[1])] ^= 1 << rng.randrange(8)

    return mutate


def large_numbers(data: bytearray, rng: random.Random) -> None:
    """A run of bytes in the footer that reads as a huge number in Thrift's compact protocol."""
    at = rng.randrange(footer_start(bytes(data)), len(data) - 8)
    data[at : at + 5] = rng.choice([b"\xff\xff\xff\xff\x0f", b"\xfe\xff\xff\xff\x0f", b"\x80\x80\x80\x80\x08"])


def random_bytes(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at : at + 8] = rng.randbytes(len(data[at : at + 8]))


def cut_out(data: bytearray, rng: random.Random) -> None:
    """A piece of the pages is gone; the footer still ends the file."""
    start = rng.randrange(footer_start(bytes(data)))
    del data[start : start + rng.choice([1, 8, 500])]


def put_in(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) - 8)
    data[at:at] = rng.randbytes(rng.choice([1, 8, 500]))


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def other_footer_length(data: bytearray, rng: random.Random) -> None:
    data[-8:-4] = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, len(data), rng.randrange(len(data))]).to_bytes(4, "little")


def repeat_footer(data: bytearray, rng: random.Random) -> None:
    data += data[footer_start(bytes(data)) + rng.choice([0, 1, -7]) :]


MUTATIONS = [
    flips(0, 1),
    flips(1, 2),
    flips(1, 2),
    large_numbers,
    random_bytes,
    cut_out,
    put_in,
    truncate,
    other_footer_length,
    repeat_footer,
]


def mutants() -> Iterator[tuple[str, bytes]]:
    originals = sorted(seeds().items())
    for number in range(MUTANTS):
        rng = random.Random(f"{SEED} {number}")
        name, data = originals[number % len(originals)]
        mutated = bytearray(data)
        mutation = MUTATIONS[(number // len(originals)) % len(MUTATIONS)]
        mutation(mutated, rng)
        yield f"mutant {number} of {name!r} ({mutation.__name__})", bytes(mutated)


def read_as_a_job_does(path: Path, note: Callable[[str], None] = lambda text: None) -> str:
    """What became of one file: "read", "rows with errors", or the exit code of the refusal."""
    config = InputConfig(path=str(path))
    try:
        files = list_inputs(str(path))
        check_input(files, config)
        plan = make_plan(files, 64, {})
        builder = PromptBuilder(config, SamplingParams(), ByteTokenizer(), 4096, run_seed=0)
        errors = rows = 0
        with ChunkReader(files, used_columns(config, input_schema(files))) as reader:
            for chunk in plan.chunks:
                built = builder.build(reader.read(chunk), chunk)
                rows += len(built)
                errors += sum(isinstance(row, Completion) for row in built)
        assert rows == plan.rows
    except JobError as error:
        return f"refused, {error.exit_code}"
    return "rows with errors" if errors else "read"


def one_batch(batch: list[tuple[str, bytes]], folder: Path) -> tuple[Counter[str], str]:
    """Outcomes, and what went wrong; runs in a fork. The name of the file under work is left in ``folder``."""
    outcomes: Counter[str] = Counter()
    for name, data in batch:
        (folder / "name").write_text(name)
        (folder / "mutant.parquet").write_bytes(data)
        try:
            outcomes[read_as_a_job_does(folder / "mutant.parquet")] += 1
        except BaseException as error:
            return outcomes, f"{name}: {type(error).__name__}: {error}"
    return outcomes, ""


def blame(outcome: Outcome, folder: Path) -> str:
    return f"{(folder / 'name').read_text()}: signal {outcome.signal} after {outcome.seconds:.1f} s, {outcome.value}"


@pytest.mark.feature("job", "damaged Parquet input: refused or rows with errors; no crash, no hang, bounded memory")
def test_mutants_of_valid_files(scratch: Path) -> None:
    todo = list(mutants())
    outcomes: Counter[str] = Counter()
    findings = []
    for start in range(0, len(todo), BATCH):
        batch = todo[start : start + BATCH]
        outcome = bounded(lambda batch=batch: one_batch(batch, scratch), seconds=30)
        if outcome.signal or isinstance(outcome.value, Failure):
            findings.append(blame(outcome, scratch))
            continue
        counts, finding = outcome.value
        outcomes += counts
        findings += [finding] if finding else []
        if outcome.rss_mib > MAX_RSS_MIB:
            findings.append(f"mutants {start} ff.: {outcome.rss_mib:.0f} MiB")
    assert not findings, "\n".join(findings)
    assert {key.rpartition(" ")[2] for key in outcomes if key.startswith("refused")} <= {
        str(ExitCode.INPUT),
        str(ExitCode.USAGE),  # the damage renamed the column that the configuration names
    }, outcomes
    assert outcomes[f"refused, {ExitCode.INPUT}"] > MUTANTS / 2
    tally["damaged Parquet inputs: no crash, no hang, at most 1 GiB"] += outcomes.total()


def test_the_originals_are_read(scratch: Path) -> None:
    for name, data in seeds().items():
        path = scratch / f"{name}.parquet"
        path.write_bytes(data)
        assert read_as_a_job_does(path) == "read"
