"""Helpers that make tiny checkpoints and merge them."""

import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import huggingface_hub
import peft
import pytest
import reference
import tokenizers
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, settings
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import mergekit_metagpt
from mergekit_metagpt.cli import main
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.surveys import SURVEYS
from mergekit_metagpt.preflight import inspect
from mergekit_metagpt.wording import BadInputError

# Each xdist worker uses one thread, so that workers do not compete for cores.
torch.set_num_threads(1)
# Nor does a test wait for the hub; those of its routes have a server of their own.
huggingface_hub.constants.HF_HUB_OFFLINE = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz",
        type=int,
        metavar="N",
        help="run N random cases of test_fuzz.py or test_sequences.py, not a few hundred, and all "
        "kinds of models in test_lost_weights.py and test_roles.py",
    )


def pytest_configure() -> None:
    """Refuse to test another copy of the package than the one beside the tests."""
    (tested,) = map(Path, mergekit_metagpt.__path__)
    its, own = map(sources, (tested, Path(__file__).parents[1] / "mergekit_metagpt"))
    if differing := sorted(name for name, _ in its.items() ^ own.items()):
        raise pytest.UsageError(
            f"The tests would run {tested}, where {differing[0]} is not as it is here. Install the "
            "package again: pip install '.[test]'"
        )


def sources(package: Path) -> dict[str, bytes]:
    """Return the contents of a package's modules by name."""
    return {str(path.relative_to(package)): path.read_bytes() for path in package.rglob("*.py")}


def invoke(*words: object, status: int = 0, **settings: Any) -> Result:
    """Run ``mergekit-metagpt`` in this process, and check its exit status."""
    done = CliRunner().invoke(main, [str(word) for word in words], **settings)
    assert done.exit_code == status, done.output
    return done


settings.register_profile(  # a slow machine must not decide
    "deterministic",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("deterministic")

VOCABULARY = 64

# For tests of what POSIX has and Windows has not: fork, signals, named pipes, devices.
on_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def llama_config(**changes: Any) -> transformers.LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaConfig(**{**settings, **changes})


def perturb(model: torch.nn.Module, scale: float, seed: int) -> None:
    """Turn a model into a fine-tune: add noise of this scale to each parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            # The noise differs in size between parameters, so that coefficients differ too.
            parameter += (scale * (1 + (number * 7 % 5)) * noise).to(parameter.dtype)


def edit(model: Path | str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint that has one weight file."""
    file = Path(model, "model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def put_nan(model: str, name: str) -> None:
    """Write a NaN into one tensor of a checkpoint."""
    edit(model, lambda tensors: tensors[name].view(-1)[:1].fill_(torch.nan))


def save_tokenizer(model: Path | str, *words: str, **special: str) -> None:
    """Write a tokenizer that splits a text at spaces; the first word stands for unknown ones."""
    vocabulary = {word: number for number, word in enumerate(words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": words[0], **special}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(model)


def lora(**changes: Any) -> peft.LoraConfig:
    """Return settings of a LoRA adapter."""
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], **changes})


def save_adapter(
    base: str,
    path: Path,
    settings: Any = None,
    seed: int = 0,
    auto: Any = transformers.AutoModelForCausalLM,
) -> Path:
    """Write an adapter of a base that changes it."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(auto.from_pretrained(base), settings or lora())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(path)
    return path


def save_family(
    directory: Path,
    config: transformers.PretrainedConfig,
    scales: tuple[float, ...] = (0.01, 0.03),
    dtype: torch.dtype = torch.float32,
    auto: Any = transformers.AutoModelForCausalLM,
    **save: Any,
) -> dict[str, str]:
    """Write a base and one expert per scale; return their absolute paths by name."""
    torch.manual_seed(0)
    base = auto.from_config(config).to(dtype)
    paths = {"base": str(directory / "base")}
    base.save_pretrained(paths["base"], **save)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for number, scale in enumerate(scales):
        base.load_state_dict(weights)
        perturb(base, scale, seed=number + 1)
        name = "abcdefgh"[number]
        paths[name] = str(directory / name)
        base.save_pretrained(paths[name], **save)
    return paths


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A float32 Llama and two experts. Tests share them and must not change them."""
    return save_family(tmp_path_factory.mktemp("family"), llama_config())


@pytest.fixture
def own(family: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A copy of the family that a test may change."""
    return {name: str(shutil.copytree(path, tmp_path / name)) for name, path in family.items()}


def merge_config(paths: dict[str, str], method: str = "metagpt", **changes: Any) -> dict[str, Any]:
    """Return a config that merges every expert of a family."""
    experts = [name for name in paths if name != "base"]
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": paths["base"],
        "models": [{"model": paths[name]} for name in experts],
    }
    return {**config, **changes}


@pytest.fixture
def config(family: dict[str, str], tmp_path: Path) -> Path:
    """The file of a config that merges every expert of the family."""
    return write_yaml(tmp_path / "metagpt.yml", merge_config(family))


def problems_of(
    config: dict[str, Any], directory: Path, out: Path | None = None, **options: Any
) -> list[str]:
    """Check a merge; return what is wrong with it."""
    yml = write_yaml(directory / "m.yml", config)
    try:
        inspect(str(yml), out and str(out), MergeOptions(**options))
    except BadInputError as error:
        return list(error.args)
    return []


def the_only(sentences: Sequence[str], *parts: str) -> None:
    """Assert that there is one sentence, and that it has these parts."""
    (sentence,) = sentences
    assert sentence.endswith(".")
    for part in parts:
        assert part in sentence


def slices_config(
    paths: dict[str, str], *slices: list[list[int]], **changes: Any
) -> dict[str, Any]:
    """Return a config with one slice per list of layer ranges; models take them in turn."""
    return {
        "merge_method": "metagpt",
        "base_model": paths["base"],
        "slices": [
            {
                "sources": [
                    {"model": path, "layer_range": ranges[number % len(ranges)]}
                    for number, path in enumerate(paths.values())
                ]
            }
            for ranges in slices
        ],
        **changes,
    }


@pytest.fixture
def merge(tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """Merge with MergeKit's own ``run_merge`` in this process; return the merged tensors."""
    numbers = iter(range(1000))

    def run(config: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
        out = tmp_path / f"merged-{next(numbers)}"
        run_merge(
            MergeConfiguration.model_validate(config),
            str(out),
            MergeOptions(**{"quiet": True, "copy_tokenizer": False, **options}),
        )
        return read(out)

    return run


def read(model: Path | str) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint directory."""
    loader = ModelReference(model=ModelPath(path=str(model))).lazy_loader()
    return {name: loader.get_tensor(name) for name in loader.index.tensor_paths}


def assert_merge_of(out: Path | str, paths: dict[str, str], granularity: str = "tensor") -> None:
    """Compare a merge of a family with the formula."""
    base, *experts = map(read, paths.values())
    expected = reference.coefficients(base, experts, granularity)
    reference.assert_merged(read(out), base, experts, expected)


def checkpoints(paths: dict[str, str]) -> Checkpoints:
    """Return the checkpoints of a family, which are listed in canonical order."""
    base, *experts = map(ModelReference.model_validate, paths.values())
    return Checkpoints(base, tuple(experts))


WEIGHTS = {"model.safetensors", "config.json", "mergekit_config.yml", "metagpt.json"}
WHOLE = WEIGHTS | {"README.md", "coefficients.png"}  # the files of a merge


def invoke_merge(*words: object, **settings: Any) -> Result:
    return invoke("merge", *words, "--quiet", "--no-copy-tokenizer", **settings)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def files(out: Path) -> dict[str, bytes]:
    """Return the contents of all files of a merge, but for the times in the record."""
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    record = json.loads(found["metagpt.json"])
    assert record.pop("times").keys() == {"started", "finished"}
    return {**found, "metagpt.json": json.dumps(record).encode()}


def command(name: str) -> str:
    """Return the path of a console script in the environment of the tests."""
    return str(Path(sysconfig.get_path("scripts"), name))


def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, offline."""
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )


def write_yaml(path: Path, *documents: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray cluster on this machine, which this process is connected to.

    Two tasks of one CPU run at a time, and Ray keeps two workers, which have imported torch.
    Tests that use the cluster belong to the xdist group "ray": two cores cannot run two clusters.
    """
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        # Workers import the tests, and the same copy of the package as this process.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cluster")))
        context = ray.init(
            "local", num_cpus=2, include_dashboard=False, log_to_driver=False,
            object_store_memory=100 * 2**20, logging_level="ERROR",
        )  # fmt: skip
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    """No test finds surveys that another one has taken, on disk or in this process."""
    monkeypatch.setattr(SURVEYS, "_begun", {})
    folder = tmp_path_factory.getbasetemp() / "caches" / uuid4().hex
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.fixture
def passes(monkeypatch):
    """Count how often checkpoints are read for a survey."""
    taken = []
    original = Checkpoints.survey

    def counted(self, *args, **kwargs):
        taken.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "survey", counted)
    return taken
