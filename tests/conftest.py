"""Fixtures that more than one folder needs: the real model, and the prompts that the repository carries."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import recorder

os.environ.setdefault("HF_HUB_OFFLINE", "1")

with suppress(ModuleNotFoundError):  # a machine with a GPU runs tests/gpu, which do without
    from hypothesis import settings

    settings.register_profile("any machine", deadline=None)  # no test depends on how fast it is
    settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    if (plugin := recorder.start()) is not None:
        config.pluginmanager.register(plugin)


PROMPTS = Path(__file__).parent.parent / "examples" / "prompts.parquet"


@pytest.fixture(scope="session")
def prompts_path() -> Path:
    """64 real prompts: columns id, topic, prompt, messages."""
    return PROMPTS


@pytest.fixture(scope="session")
def smollm_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF; `make test` puts it there."""
    path = Path(os.environ.get("BATCHINFER_TEST_GGUF", ""))
    if not path.is_file():
        pytest.skip("the real model is not here: set BATCHINFER_TEST_GGUF, or run `make test`")
    return path.resolve()


@pytest.fixture(scope="session")
def smollm_dir(smollm_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face folder, converted by transformers, so that our GGUF reader has no part in it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = tmp_path_factory.mktemp("smollm")
    where = {"gguf_file": smollm_gguf.name}
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        smollm_gguf.parent, dtype=torch.bfloat16, quantization_config=dequantize, **where
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm_gguf.parent, **where).save_pretrained(folder)
    # transformers splits text as GPT-2 does; this model's own tokenizer takes digits one by one first.
    edit = folder / "tokenizer.json"
    tokenizer = json.loads(edit.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]}, "post_processor": None}
    edit.write_text(json.dumps(tokenizer))
    return folder
