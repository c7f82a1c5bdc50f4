"""The example configs, planned and merged on tiny stand-ins for the models they name."""

import re
from pathlib import Path
from zlib import crc32

import pytest
import torch
import transformers
import yaml
from conftest import VOCABULARY, read, save_adapter
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import load_config
from paper_stand_ins import save_model

from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.method.merge_method import MetaGPTMerge

EXAMPLES = Path(__file__).parents[1] / "example_configs"

# Tokens that these have and their base has not: 1, 1 and 23296 of them in the originals.
ADDED_TOKENS = {"TIGER-Lab/MAmmoTH-7B": 1, "TIGER-Lab/MAmmoTH-13B": 1, "hfl/chinese-llama-2-7b": 46}


@pytest.fixture(params=sorted(EXAMPLES.glob("*.yml")), ids=lambda path: path.stem)
def example(request):
    return request.param


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """Return the path of a tiny model, made when its name is first asked for."""
    directory = tmp_path_factory.mktemp("hub")

    def make(name):
        base, _, adapter = name.partition("+")
        path = directory / (adapter or base).replace("/", "--")
        if adapter:
            return f"{make(base)}+{save_adapter(make(base), path, seed=crc32(adapter.encode()))}"
        if not path.exists():
            save_model(path, VOCABULARY + ADDED_TOKENS.get(base, 0))
        return str(path)

    return make


def merges(text: str, stages: Path) -> dict[str | None, MergeConfiguration]:
    """Parse as ``mergekit-multi`` does; a file with one merge holds just an unnamed one."""
    return load_config(text, str(stages))[0]


def localized(example, stand_in, stages):
    """Return the merges of an example with a stand-in for every model."""
    text = example.read_text()
    configs = merges(text, stages)
    models = {str(model) for config in configs.values() for model in config.referenced_models()}
    models -= {str(stages / name) for name in configs if name}

    def replace(node):
        if isinstance(node, dict):
            return {key: replace(value) for key, value in node.items()}
        if isinstance(node, list):
            return [replace(value) for value in node]
        return stand_in(node) if node in models else node

    documents = [replace(document) for document in yaml.safe_load_all(text)]
    return merges(yaml.safe_dump_all(documents), stages)


def test_an_example_starts_with_its_command_and_a_merge_of_this_package(example, tmp_path):
    text = example.read_text()
    header = text.split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert ("mergekit-multi " if "\n---\n" in text else "mergekit-") in header
    assert set(re.findall(r"example_configs/(\S+)", header)) <= {example.name}
    (name, first), *later = merges(text, tmp_path).items()
    assert isinstance(merge_methods.get(first.merge_method), MetaGPTMerge)
    if later:  # one of them takes the outcome of the first, and it is the last that is kept
        ((last, config),) = later
        assert last is None
        assert str(tmp_path / name) in map(str, config.referenced_models())


def test_an_example_merges_every_tensor_into_a_model_that_loads(example, stand_in, tmp_path):
    cache = {"lora_merge_dtype": "float32", "lora_merge_cache": str(tmp_path / "lora-cache")}
    for name, config in localized(example, stand_in, tmp_path).items():
        dtype = config.out_dtype or config.dtype
        base = read(config.base_model.model.path)
        out = tmp_path / (name or "merged")
        run_merge(config, str(out), MergeOptions(quiet=True, random_seed=0, **cache))
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert dtype is None or str(model.dtype) == f"torch.{dtype}"
        assert model.config.vocab_size == len(tokenizer) == VOCABULARY
        assert model(torch.arange(8)[None]).logits.isfinite().all()
        merged = read(out)
        assert merged.keys() == base.keys()
        assert any(not torch.equal(merged[key], base[key].to(model.dtype)) for key in base)


def test_the_annotated_example_spells_out_the_defaults(tmp_path):
    config = merges((EXAMPLES / "metagpt.yml").read_text(), tmp_path)[None]
    spec = merge_methods.get(config.merge_method).spec
    defaults = {parameter.name: parameter.default for parameter in spec.parameters}
    defaults["exponent"] = GRANULARITIES[defaults["granularity"]].default_exponent
    for parameters in (config.parameters, *(model.parameters for model in config.models)):
        assert parameters.items() <= defaults.items()
    assert config.parameters.keys() == {"granularity", "exponent", "lambda"}
