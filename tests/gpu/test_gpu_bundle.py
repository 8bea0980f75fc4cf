"""A rank on a GPU that has a bundle of kernels: nothing is compiled, neither a kernel nor a C module of Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import recorder
import torch

TESTS = Path(__file__).parent.parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SCRIPT = """
import sys
import numpy as np
from engine.tiny_engine import LetterTokenizer, run
from triton.compiler import ASTSource
from batchinfer.config import EngineConfig, ModelConfig
from batchinfer.engine.loading import load_engine
from batchinfer.types import Request, SamplingParams

class Letters(LetterTokenizer):
    vocab_size = 512

def forbidden(*args, **options):
    raise AssertionError("a kernel is compiled that should be in the bundle")

ASTSource.make_ir = forbidden
config = EngineConfig(ops="triton", kernels=sys.argv[2])
engine = load_engine(ModelConfig(sys.argv[1], dummy_weights=True), config, tokenizer=Letters())
params = SamplingParams(max_tokens=30, temperature=0.9, top_p=0.9, logprobs=2, ignore_eos=True)
requests = [Request(i, np.arange(2, 40 + 7 * i, dtype=np.int32), params, seed=i) for i in range(20)]
done = run(engine, requests)
assert all(len(c.samples[0].token_ids) == 30 for c in done.values())
engine.close()
"""


@pytest.mark.hardware("kernels compiled ahead")
def test_a_rank_with_a_bundle_calls_no_compiler(real_gpu, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if torch.version.cuda is None:
        pytest.skip("needs an NVIDIA GPU")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    target, bundle = "sm_{}{}".format(*torch.cuda.get_device_capability()), tmp_path / "kernels.zip"
    command = ("bundle", f"model.path={tmp_path}", f"bundle.path={bundle}", f"bundle.targets=[{target}]")
    made = subprocess.run([sys.executable, "-P", "-m", "batchinfer", *command], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "needs a C compiler" not in made.stdout
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_CACHE_DIR")}
    environment |= {"PATH": "", "TMPDIR": str(tmp_path), "PYTHONPATH": str(TESTS)}
    program = [sys.executable, "-P", "-c", SCRIPT, str(tmp_path), str(bundle)]
    used = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    recorder.note("triton on cuda", "run")
