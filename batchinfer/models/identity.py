"""Which model this is, for the job's plan: digests that change when the model does. No torch; milliseconds.

Weights are not read whole: a digest of 16 GB takes minutes on every start. Headers and sizes alone would take every
fine-tune for its base model, so blocks spread over each file go in as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

from batchinfer.models.encoder_spec import encoder_spec
from batchinfer.models.files import open_for_reading, read_at, read_json
from batchinfer.models.gguf import is_gguf, read_gguf
from batchinfer.models.peft_files import CONFIG, WEIGHTS
from batchinfer.models.safetensors import open_folder, read_header
from batchinfer.models.spec import load_spec
from batchinfer.models.tokenizer import Tokenizer, load_tokenizer

SAMPLES, SAMPLE_BYTES = 64, 4096
"""Per weight file. Training changes nearly every value, so a few samples tell, for 64 small reads."""


def check_model(model_path: str) -> None:
    """Refuse what is no model, or one that nothing here runs. Raises ModelError that says what is supported."""
    if encoder_spec(model_path) is None:
        load_spec(model_path)


def model_fingerprint(model_path: str, tokenizer: Tokenizer | None = None) -> dict[str, str]:
    """sha256 (hex) of the model's "config", "weights" (headers, sizes and samples of every file) and "tokenizer"
    (``tokenizer`` saves loading it again). Raises ModelError."""
    if is_gguf(model_path):
        file = read_gguf(model_path)
        config = {key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.")}
        files = [(file.path, file.header_bytes, file.size)]
    else:
        config = read_json(os.path.join(model_path, "config.json"))
        files = [(file.path, 8 + len(file.header), file.size) for file in open_folder(model_path)]
    weights = hashlib.sha256()
    for path, header_bytes, size in files:
        weights.update(_file_digest(path, header_bytes, size))
    canonical = json.dumps(config, sort_keys=True, ensure_ascii=True)
    return {
        "config": hashlib.sha256(canonical.encode()).hexdigest(),
        "weights": weights.hexdigest(),
        "tokenizer": (tokenizer or load_tokenizer(model_path)).fingerprint,
    }


def adapter_fingerprints(adapters: Mapping[str, str]) -> dict[str, str]:
    """sha256 (hex) of each adapter's config and weights, by "adapter NAME". Raises ModelError."""
    found = {}
    for name, folder in sorted(adapters.items()):
        config = read_json(os.path.join(folder, CONFIG))
        file = read_header(os.path.join(folder, WEIGHTS))
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        digest.update(_file_digest(file.path, 8 + len(file.header), file.size))
        found[f"adapter {name}"] = digest.hexdigest()
    return found


def _file_digest(path: str, header_bytes: int, size: int) -> bytes:
    """Digest of a file's size, header and evenly spread samples of the rest. Its name and place do not matter."""
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    starts = [header_bytes + (size - header_bytes) * i // SAMPLES for i in range(SAMPLES)]
    with open_for_reading(path) as (fd, _):
        for start, length in [(0, header_bytes), *((start, SAMPLE_BYTES) for start in starts)]:
            block = bytearray(min(length, size - start))
            read_at(fd, start, memoryview(block), path)
            digest.update(block)
    return digest.digest()
