"""The conda recipe: every variant renders, the CPU build is built, tested, installed and runs, and users get the build
that their machine can use. All of it against a channel made of this machine (conda_channel.py), without conda-forge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes.conda_channel import LocalChannel, add_nvcc, add_this_machine
from recipes.project import ROOT, requirements

rattler_build = pytest.importorskip("rattler_build", reason="pip install py-rattler-build")
pytest.importorskip("rattler", reason="pip install py-rattler")

pytestmark = [
    pytest.mark.feature("recipes", "conda: one name, a build per device; the solver takes cuda only where a driver is"),
    pytest.mark.skipif(sys.platform != "linux", reason="the recipe is for Linux"),
]

RECIPE, VARIANTS = ROOT / "recipes/conda/recipe.yaml", ROOT / "recipes/conda/variants.yaml"

FLAVORS = ["cpu", "cuda118", "cuda126", "cuda128", "cuda130", "rocm63", "sycl20242"]

DEVICE = {"cpu": "cpu", "cud": "cuda", "roc": "rocm", "syc": "xpu"}

COMMON = {"cmake >=3.25", "ninja >=1.11", "sysroot_linux-64 2.28.*"}
GCC13 = {"gcc_linux-64 13.*", "gxx_linux-64 13.*"}
TOOLCHAIN = {
    "cpu": GCC13,
    "cuda118": {"gcc_linux-64 11.*", "gxx_linux-64 11.*", "nvcc_linux-64 11.8.*"},
    "cuda126": GCC13 | {"cuda-nvcc_linux-64 12.6.*"},
    "cuda128": GCC13 | {"cuda-nvcc_linux-64 12.8.*"},
    "cuda130": GCC13 | {"cuda-nvcc_linux-64 13.0.*"},
    "rocm63": GCC13 | {"hipcc 6.3.*"},
    "sycl20242": GCC13 | {"dpcpp_linux-64 2024.2.*"},
}


def render(recipe: Path) -> dict[str, Any]:
    """Flavour -> rendered variant."""
    variants = rattler_build.VariantConfig.from_file(str(VARIANTS))
    stage0 = rattler_build.Stage0Recipe.from_file(str(recipe))
    rendered = stage0.render(variants, rattler_build.RenderConfig())
    return {variant.recipe.to_dict()["build"]["string"].split("_")[0]: variant for variant in rendered}


@pytest.fixture(scope="module")
def rendered() -> dict[str, dict[str, Any]]:
    return {flavor: variant.recipe.to_dict() for flavor, variant in render(RECIPE).items()}


def test_there_is_a_build_for_every_device(rendered: dict[str, dict[str, Any]]) -> None:
    assert list(rendered) == FLAVORS
    assert {recipe["package"]["name"] for recipe in rendered.values()} == {"batchinfer"}


@pytest.mark.parametrize("flavor", FLAVORS)
def test_each_build_has_its_toolchain_and_is_told_its_device(flavor: str, rendered: dict[str, dict[str, Any]]) -> None:
    recipe = rendered[flavor]
    assert set(recipe["requirements"]["build"]) == COMMON | TOOLCHAIN[flavor]
    assert recipe["build"]["script"]["env"]["BATCHINFER_DEVICE"] == DEVICE[flavor[:3]]
    assert f"pytorch >=2.4 {DEVICE[flavor[:3]]}*" in recipe["requirements"]["run"]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_who_is_chosen_unasked(flavor: str, rendered: dict[str, dict[str, Any]]) -> None:
    build, run = rendered[flavor]["build"], rendered[flavor]["requirements"]["run"]
    cuda = flavor.startswith("cuda")
    assert build["number"] == (200 if cuda else 0)
    assert build["variant"]["down_prioritize_variant"] == {"rocm63": 1, "sycl20242": 2}.get(flavor, 0)
    assert ("__cuda" in run) == cuda
    ranges = {"cuda118": "11.8,<12", "cuda126": "12.6,<13", "cuda128": "12.8,<13", "cuda130": "13.0,<14"}
    assert [f"cuda-version >={ranges[flavor]}"] == [r for r in run if "cuda-version" in r] if cuda else True


@pytest.mark.parametrize(("key", "part"), [("dependencies", "run"), ("requires", "host")])
def test_every_requirement_of_the_python_package_is_one_of_the_recipe(
    key: str, part: str, rendered: dict[str, dict[str, Any]]
) -> None:
    for name, least in requirements(key):
        wanted = f"{name.replace('torch', 'pytorch')} >={least}"
        for flavor, recipe in rendered.items():
            given = [" ".join(line.split()[:2]) for line in recipe["requirements"][part]]
            assert wanted in given, flavor


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> LocalChannel:
    """A channel with all seven builds: the recipe's metadata around an empty package, and packages that they need."""
    folder = tmp_path_factory.mktemp("choices")
    channel = LocalChannel(folder / "channel")
    for name in ("python", "transformers", "tokenizers", "safetensors", "gguf", "jinja2", "hydra-core"):
        channel.add(name, "3.11.7" if name == "python" else "99")
    for build in ("cpu_0", "rocm_0", "xpu_0"):
        channel.add("pytorch", build=build, number=100 if build == "cpu_0" else 0)
    for name in ("pyarrow", "numpy", "rich", "mpi4py", "dpcpp-cpp-rt"):
        channel.add(name)
    for version, least in (("11.8", "11"), ("12.6", "12"), ("12.8", "12"), ("13.0", "13")):
        channel.add("cuda-version", version, constrains=[f"__cuda >={least}"])
        pins = ["__cuda", f"cuda-version {version}.*"]
        channel.add("pytorch", build=f"cuda{version.replace('.', '')}_0", depends=pins, number=200)
    channel.index()
    recipe = yaml.safe_load(RECIPE.read_text())
    del recipe["source"], recipe["tests"], recipe["about"]
    recipe["build"]["script"] = "mkdir -p $PREFIX/share && echo empty > $PREFIX/share/batchinfer"
    recipe["build"].pop("python")
    recipe["requirements"] |= {"build": [], "host": []}
    empty = folder / "recipe.yaml"
    empty.write_text(yaml.safe_dump(recipe, sort_keys=False))
    tools = rattler_build.ToolConfiguration(test_strategy="skip")
    for variant in render(empty).values():
        variant.run_build(tool_config=tools, output_dir=str(channel.folder), channels=[channel.uri])
    return channel


@pytest.mark.parametrize(
    ("driver", "specs", "flavor"),
    [
        ("", ["batchinfer"], "cpu"),
        ("13.0", ["batchinfer"], "cuda130"),
        ("12.8", ["batchinfer"], "cuda128"),
        ("11.8", ["batchinfer"], "cuda118"),
        ("12.8", ["batchinfer", "cuda-version 12.6.*"], "cuda126"),
        ("12.8", ["batchinfer * cpu*"], "cpu"),
        ("", ["batchinfer * rocm*"], "rocm63"),
        ("", ["batchinfer * sycl*"], "sycl20242"),
        ("13.0", ["batchinfer * rocm*"], "rocm63"),
    ],
)
def test_which_build_a_user_gets(driver: str, specs: list[str], flavor: str, choices: LocalChannel) -> None:
    chosen = choices.solve(*specs, cuda=driver)
    assert chosen["batchinfer"].split("=")[1].split("_")[0] == flavor
    assert chosen["pytorch"].split("=")[1].startswith(DEVICE[flavor[:3]])


def test_a_cuda_build_can_not_be_installed_without_a_driver(choices: LocalChannel) -> None:
    with pytest.raises(Exception, match="__cuda"):
        choices.solve("batchinfer * cuda*")


@pytest.mark.slow
@pytest.mark.feature("recipes", "conda: the CPU build is built, tested, installed and runs, on a local channel")
def test_the_cpu_build_works(tmp_path: Path) -> None:
    """Two minutes of CPU time without a compiler cache."""
    channel = LocalChannel(tmp_path / "channel")
    add_this_machine(channel)
    prefix = install(channel, "cpu", tmp_path)
    done = bench(prefix, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["output_tokens"] == 2 * 1024


@pytest.mark.skipif(not os.environ.get("BATCHINFER_TEST_CONDA_CUDA"), reason="takes four minutes: make conda-check")
@pytest.mark.feature("recipes", "conda: the CUDA build is built with NVIDIA's wheels and installed, on a local channel")
def test_the_cuda_build_is_built_and_refuses_a_node_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONDA_OVERRIDE_CUDA", "13.0")  # for the tests within the recipe
    channel = LocalChannel(tmp_path / "channel")
    add_this_machine(channel)
    add_nvcc(channel, tmp_path / "nvcc")
    prefix = install(channel, "cuda130", tmp_path, cuda="13.0")
    found = subprocess.run([prefix / "bin/batchinfer", "doctor", "--json"], capture_output=True, text=True)
    assert json.loads(found.stdout)["build"]["architectures"] == ["80-real"]
    done = bench(prefix, tmp_path)
    assert done.returncode == 69
    assert "this build is for CUDA, and this process can use no GPU" in done.stderr


def install(channel: LocalChannel, flavor: str, folder: Path, cuda: str = "") -> Path:
    """Build a variant, let the recipe's tests pass, and install it: the environment."""
    channel.index()
    tools = rattler_build.ToolConfiguration(test_strategy="native")
    try:
        render(RECIPE)[flavor].run_build(tool_config=tools, output_dir=str(channel.folder), channels=[channel.uri])
    except rattler_build.RattlerBuildError as error:  # it says only that a script failed
        logs = [path.read_text()[-4000:] for path in channel.folder.glob("bld/*/work/conda_build.log")]
        pytest.fail(f"{error}\n" + "\n".join(logs))
    channel.index()
    prefix = folder / "environment"
    channel.install(prefix, "batchinfer", cuda=cuda)
    where = [str(prefix / "bin/python"), "-c", "import batchinfer; print(batchinfer.__file__)"]
    found = subprocess.run(where, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(prefix)), "another installation was tested"
    return prefix


def bench(prefix: Path, folder: Path) -> subprocess.CompletedProcess:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY))
    settings = ["model.path=model", "model.dummy_weights=true", "bench.workload=decode", "bench.rows=2"]
    command = [str(prefix / "bin/batchinfer"), "bench", *settings, "engine.kv_cache_gb=0.1"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
