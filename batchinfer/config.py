"""The schema of a job's configuration, key by key; rules.py has what they may be together.

The files in configs/ carry the same keys and defaults with an explanation of each; they are the documentation.
A configuration is data: frozen, composed once on rank 0, sent to the other ranks as JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from batchinfer.types import SamplingParams

MISSING = "???"
"""Hydra's mark of a value that the user has to give."""


@dataclass(frozen=True)
class ModelConfig:
    """``path``: a Hugging Face model directory (config.json, safetensors, tokenizer) or one .gguf file.
    ``dummy_weights``: random ones in place of the files', for measurements. ``adapters``: names of LoRA adapters, and
    the folders that PEFT has written them to."""

    path: str = MISSING
    dummy_weights: bool = False
    adapters: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskConfig:
    """What is computed for a row: ``generate`` continues its prompt, ``score`` looks at a given continuation, ``embed``
    makes a vector of it, ``classify`` tells its class, ``rerank`` how well a document answers a query. ``activation``:
    what makes probabilities of the values of the latter two."""

    name: str = "generate"
    activation: str = "auto"


@dataclass(frozen=True)
class EmbedConfig:
    """Of the task embed. ``pooling`` "auto": what the model's folder says (1_Pooling/config.json), else the last token.
    ``dimensions`` > 0: so many first ones are kept (Matryoshka; Kusupati et al. 2022, arXiv:2205.13147), before a
    vector is brought to length 1 (``normalize``)."""

    pooling: str = "auto"
    dimensions: int = 0
    normalize: bool = True


@dataclass(frozen=True)
class RerankConfig:
    """Of the task rerank. ``template`` (Jinja over query, document and ``instruction``: the text, or the path of a .j2
    or .jinja file) makes the prompt of a pair; None: both texts as the model's tokenizer joins them. ``yes_token`` and
    ``no_token``: those whose logits tell the relevance, of a model that has no classification head."""

    template: str | None = None
    instruction: str = "Given a web search query, retrieve relevant passages that answer the query"
    yes_token: str | None = None
    no_token: str | None = None


@dataclass(frozen=True)
class InputConfig:
    """Where the rows come from, and which columns make a prompt.

    ``path`` is a Parquet file, a folder (hive partitions become columns) or a glob. The prompt is ``prompt_column``
    unless one of ``messages_column`` (list<struct<role, content>>), ``template`` (Jinja over the columns: the text, or
    the path of a .j2 or .jinja file) or ``token_ids_column`` (list<int>) is given. ``continuation_column`` holds the
    text that the task score looks at, ``query_column`` and ``document_column`` those of the task rerank. ``columns``
    None passes all input columns through to the output. ``sampling_columns`` maps a field of SamplingParams to the
    column that overrides it row by row. ``allow_append``: files that were not there when the job was planned are added
    to it. ``adapter_column`` names the adapter (``model.adapters``) that a row goes through, null for none.
    ``retry_errors_of``: a finished output whose good rows are taken over, so that only its error rows are
    computed.
    """

    path: str = MISSING
    prompt_column: str = "prompt"
    messages_column: str | None = None
    template: str | None = None
    token_ids_column: str | None = None
    continuation_column: str | None = None
    query_column: str | None = None
    document_column: str | None = None
    adapter_column: str | None = None
    columns: list[str] | None = None
    sampling_columns: dict[str, str] = field(default_factory=dict)
    allow_append: bool = False
    retry_errors_of: str | None = None


@dataclass(frozen=True)
class OutputConfig:
    """``path``: the folder of the job's part files. ``prefix`` stands before the name of every generated column.
    ``reasoning``: "auto" puts what the model marks as its thoughts into a column of its own."""

    path: str = MISSING
    prefix: str = ""
    token_ids: bool = False
    reasoning: str = "off"
    compression: str = "zstd"
    rows_per_chunk: int = 1024


@dataclass(frozen=True)
class EngineConfig:
    """How the engine uses the device. 0 means: find out (threads: the CPUs this rank may use; memory: what is free;
    max_model_len: the model's own limit)."""

    device: str = "auto"
    ops: str = "auto"
    kernels: str | None = None
    dtype: str = "auto"
    kv_dtype: str = "auto"
    weights: str = "auto"
    threads: int = 0
    page_size: int = 16
    num_pages: int = 0
    kv_cache_gb: float = 0.0
    max_slots: int = 256
    max_step_tokens: int = 1024
    max_model_len: int = 0
    prefix_cache: bool = True
    lookup: int = 0
    expected_share: float = 0.0
    reorder: bool = True
    profile: str | None = None


@dataclass(frozen=True)
class JobConfig:
    """``max_error_fraction``: more error rows than this share of all rows end a complete job with exit code 3.
    ``progress_seconds``: time between two progress lines where the output is not a terminal. ``journal_seconds``: time
    between two records of the rows that finished in chunks that did not. ``margin_seconds``: how long before the end
    of the allocation the job stops. ``row_seconds``: longest time of a row in the engine, 0 for any.
    ``strict_resume``: refuse to go on with another device, dtype or version of batchinfer."""

    max_error_fraction: float = 0.01
    progress_seconds: float = 60.0
    journal_seconds: float = 60.0
    margin_seconds: float = 120.0
    row_seconds: float = 0.0
    strict_resume: bool = False


@dataclass(frozen=True)
class ClusterConfig:
    """``mpi``: "auto" uses MPI where a launcher (srun, mpiexec ...) started several ranks, "on" always, "off" never.
    ``hosts_per_reader``: of so many hosts one rank reads the weights for all, 0: every rank reads. ``share_weights``:
    ranks of a NUMA domain that compute on the CPU have one copy. ``srun``: options that slurm/run.sh gives to srun; the
    program itself does not use them."""

    mpi: str = "auto"
    hosts_per_reader: int = 64
    share_weights: bool = True
    srun: str = ""


@dataclass(frozen=True)
class BenchConfig:
    """Of ``batchinfer bench`` alone: the input's first ``rows`` rows, or ``rows`` requests of a ``workload`` of random
    token ids (0: all, or the workload's own number), run ``repeat`` times."""

    workload: str = "none"
    rows: int = 0
    repeat: int = 1


@dataclass(frozen=True)
class CompactConfig:
    """Of ``batchinfer compact`` alone: the folder ``path`` gets files of about ``rows_per_file`` rows."""

    path: str = MISSING
    rows_per_file: int = 1_000_000


@dataclass(frozen=True)
class ConvertConfig:
    """Of ``batchinfer convert`` alone: the Parquet file that it makes."""

    path: str = MISSING


@dataclass(frozen=True)
class ExportConfig:
    """Of ``batchinfer export`` alone: the file of JSON lines that it makes, and what a line is."""

    path: str = MISSING
    format: str = "rows"


@dataclass(frozen=True)
class BundleConfig:
    """Of ``batchinfer bundle`` alone: the file of kernels that it makes, and for which GPUs."""

    path: str = MISSING
    targets: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Config:
    """Everything a job depends on, apart from the files themselves."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    input: InputConfig = field(default_factory=InputConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    job: JobConfig = field(default_factory=JobConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    compact: CompactConfig = field(default_factory=CompactConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    bundle: BundleConfig = field(default_factory=BundleConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "task.name": ("generate", "score", "embed", "classify", "rerank"),
    "task.activation": ("auto", "softmax", "sigmoid", "none"),
    "embed.pooling": ("auto", "last", "mean", "cls"),
    "output.reasoning": ("off", "auto"),
    "output.compression": ("zstd", "snappy", "lz4", "gzip", "none"),
    "engine.device": ("auto", "cpu", "cuda", "rocm", "xpu", "reference"),
    "engine.ops": ("auto", "native", "triton"),
    "engine.dtype": ("auto", "bf16", "fp16", "fp32"),
    "engine.kv_dtype": ("auto", "bf16", "fp32", "fp8", "int8"),
    "engine.weights": ("auto", "keep", "int8"),
    "cluster.mpi": ("auto", "on", "off"),
    "export.format": ("rows", "openai"),
    "bench.workload": ("none", "sharegpt", "prefill", "decode", "prefix", "samples"),
}
"""Keys whose value is one word of a list."""

RANGES: dict[str, tuple[float, float]] = {
    "output.rows_per_chunk": (1, 2**20),
    "embed.dimensions": (0, 2**20),
    "engine.threads": (0, 4096),
    "engine.page_size": (1, 1024),
    "engine.num_pages": (0, 2**31 - 1),
    "engine.kv_cache_gb": (0.0, 2.0**20),
    "engine.max_slots": (1, 2**16),
    "engine.max_step_tokens": (1, 2**20),
    "engine.max_model_len": (0, 2**27),
    "engine.lookup": (0, 64),
    "engine.expected_share": (0.0, 1.0),
    "job.max_error_fraction": (0.0, 1.0),
    "job.progress_seconds": (0.1, 86400.0),
    "job.journal_seconds": (0.0, 86400.0),
    "job.margin_seconds": (0.0, 86400.0),
    "job.row_seconds": (0.0, 1e9),
    "cluster.hosts_per_reader": (0, 2**20),
    "bench.rows": (0, 2**40),
    "bench.repeat": (1, 1000),
    "compact.rows_per_file": (1, 2**40),
}
"""Keys whose value is a number within bounds (both ends included)."""

VECTOR_TASKS = ("embed", "classify", "rerank")
"""Tasks that make numbers of a text, and foretell no token of it."""

TYPE_NAMES = {
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list[str]": "a list of texts, as in [one,two]",
    "tuple[str, ...]": "a list of texts, as in [one,two]",
    "tuple[int, ...]": "a list of whole numbers, as in [1,2]",
    "dict[str, str]": "a mapping, as in {field:column}",
    "dict[int, float]": "a mapping of tokens to numbers, as in {50256:-100}",
}
"""How a type is called in a message."""


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dicts, lists and scalars, fit for JSON and YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """The inverse of :func:`to_dict`; keys that are absent keep their defaults, unknown ones raise KeyError."""
    kinds, known = get_type_hints(Config), {key for key, _ in items()}
    for section, given in values.items():
        for key in [f"{section}.{name}" for name in given] if section in kinds else [section]:
            if key not in known:
                raise KeyError(key)
    sections = {}
    for name, kind in kinds.items():
        given = dict(values.get(name, {}))
        if kind is SamplingParams:  # its lists are tuples: it is hashable and shared between requests
            given = {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in given.items()}
            if "logit_bias" in given:
                given["logit_bias"] = {int(token): float(bias) for token, bias in given["logit_bias"].items()}
        sections[name] = kind(**given)
    return Config(**sections)


def items(config: Config | None = None) -> Iterator[tuple[str, Any]]:
    """Every dotted key of the schema with its value (the default's, if no config is given)."""
    for section in dataclasses.fields(Config):
        values = getattr(config or Config(), section.name)
        for f in dataclasses.fields(values):
            yield f"{section.name}.{f.name}", getattr(values, f.name)


DEFAULTS = dict(items())


def type_of(key: str) -> str:
    """The type of a dotted key as it is written in the schema, "int | None" for example. KeyError if there is none."""
    section, _, name = key.partition(".")
    return {f.name: str(f.type) for f in dataclasses.fields(get_type_hints(Config)[section])}[name]


def allowed(key: str) -> str:
    """What a dotted key may hold, in words."""
    base, _, optional = type_of(key).partition(" | ")
    text = TYPE_NAMES[base]
    if key in CHOICES:
        text = f"one of {', '.join(CHOICES[key])}"
    if key in RANGES:
        text += " in [{:g}, {:g}]".format(*RANGES[key])
    return f"{text}, or null" if optional else text
