"""Models on the hub are measured tensor by tensor, and none of their weights are stored."""

import json
import pickle
import re
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import invoke, llama_config, merge_config, read, save_adapter, save_family, write_yaml
from hub_server import serving
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save, save_file

import mergekit_metagpt
from mergekit_metagpt.measure.loaders import find_on_hub, forget_files, set_up_worker
from mergekit_metagpt.planning.models import find_model_files
from mergekit_metagpt.preflight.adapters import bad_adapters
from mergekit_metagpt.wording import BadInputError

SHARD = "model-00002-of-00003.safetensors"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A family in shards, of which one expert's end elsewhere."""
    directory = tmp_path_factory.mktemp("sharded")
    settings = {"config": llama_config(num_hidden_layers=1), "dtype": torch.float16}
    paths = save_family(directory, **settings, max_shard_size="10KB")
    larger = save_family(directory / "larger", **settings, max_shard_size="14KB")
    return {**paths, "b": larger["b"]}


@pytest.fixture
def family(on_disk):
    """The same models by their names on the hub."""
    return {name: f"org/{name}" for name in on_disk}


@pytest.fixture
def hub(on_disk, tmp_path, monkeypatch):
    """The hub, as this process sees it: with these models, and an empty cache."""
    with serving() as hub:
        for name, path in on_disk.items():
            hub.put(f"org/{name}", path)
        constants = huggingface_hub.constants
        files = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries
        yield hub
    forget_files()


@pytest.fixture
def copied(hub, on_disk, tmp_path):
    """The directory of org/copy, which a test may change."""
    directory = shutil.copytree(on_disk["a"], tmp_path / "copy")
    hub.put("org/copy", directory)
    return directory


@pytest.fixture
def call(tmp_path):
    """Run a command on a merge of some models."""

    def call(paths, *words, of="coefficients", status=0, **changes):
        yml = write_yaml(tmp_path / "merge.yml", merge_config(paths, **changes))
        return invoke(of, yml, *words, status=status)

    return call


@pytest.fixture
def measured(call):
    """Return what is measured of some models, under their short names."""

    def measured(paths, *words, **changes):
        said = call(paths, "--json", *words, **changes).stdout
        for name, path in paths.items():
            said = said.replace(json.dumps(path), json.dumps(name))
        return json.loads(said)

    return measured


def weights_in(directory):
    """Return the weight files in a directory, also those of which only a part is there yet."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return [file for file in files if file.stat().st_size > 4_000]


def is_of_a_tensor(hub):
    """Return whether the last request is for a tensor, and not for the header of a file."""
    return hub.asked[-1][2] not in (None, "bytes=0-100000", "bytes=0-7")


def find(*names, **options):
    return find_on_hub(map(ModelReference.model_validate, names), MergeOptions(**options))


@pytest.mark.parametrize("granularity", ["model", "direction"])
def test_the_figures_are_those_of_the_same_models_on_this_disk(
    granularity, call, measured, hub, family, on_disk, tmp_path
):
    stored = []
    hub.before = lambda file: stored.extend(weights_in(tmp_path))
    parameters = {"granularity": granularity}
    there = measured(family, parameters=parameters)
    assert there == measured(on_disk, parameters=parameters)
    assert not {str(model) for model in LoaderCache().loaders} & {"org/a", "org/b"}
    assert there == measured({**family, "base": on_disk["base"]}, parameters=parameters)
    if granularity == "model":
        assert "weight:" in call(family, of="resolve").stdout
    assert any(file.endswith(".safetensors") for _, file, _ in hub.asked)
    assert not stored
    assert not weights_in(tmp_path)


def test_all_tensors_are_of_the_commit_that_the_revision_had_at_first(
    measured, hub, family, on_disk
):
    def publish(file):
        if file == SHARD and is_of_a_tensor(hub):
            hub.put("org/alive", on_disk["base"])
            hub.put("org/brave", on_disk["base"], "tuned")

    hub.put("org/alive", on_disk["a"])
    hub.put("org/brave", on_disk["base"])
    hub.put("org/brave", on_disk["b"], "tuned")
    hub.before = publish
    names = {**family, "a": "org/alive", "b": "org/brave@tuned"}
    assert measured(names) == measured(on_disk)
    assert hub.models["org/alive"]["main"] == Path(on_disk["base"])


def test_a_worker_reads_a_model_in_one_file_that_the_main_process_has_found(hub, on_disk, tmp_path):
    tensors = {"whole": torch.rand(3, 2), "none": torch.empty(0, 2), "one": torch.tensor(5)}
    (tmp_path / "whole").mkdir()
    save_file(tensors, tmp_path / "whole" / "model.safetensors")
    shutil.copy(Path(on_disk["a"], "config.json"), tmp_path / "whole")
    hub.put("org/whole", tmp_path / "whole")
    found = pickle.loads(pickle.dumps(find("org/whole")))
    set_up_worker(MergeOptions(), found)
    loader = LoaderCache().get(ModelReference.model_validate("org/whole"))
    assert loader.index.tensor_paths.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loader.get_tensor(name), tensor)


def test_a_check_reads_the_headers_there(call, hub, family, on_disk):
    there, here = call(family, of="check").stdout, call(on_disk, of="check").stdout
    for name, path in on_disk.items():
        here = here.replace(str(path), family[name])
    figures = re.compile(r"(Tensors|Parameters|Bytes read|Bytes written)\W+([\d.,]+ ?\w*)")
    assert figures.findall(there) == figures.findall(here)
    assert len(figures.findall(there)) == 4
    assert not [part for _, file, part in hub.asked if "safetensors" in file and part is None]


def test_a_server_that_sends_another_part_is_one_sentence(hub, tmp_path):
    (found,) = find("org/a")
    name, header = next(iter(found.headers.items()))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / Path(header.file).name).write_bytes(bytes(header.start + 3))
    hub.models["org/a"][found.repository.commit] = tmp_path / "empty"
    size = header.end - header.start
    said = rf"org/a cannot be read from the hub \(3 bytes came instead of {size}\); .*hf download"
    with pytest.raises(BadInputError, match=said):
        found.get_tensor(name)


def test_offline_the_hub_is_not_asked(call, hub, family, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = call(family, status=1).stderr
    assert "Model org/a is no directory here, and the hub cannot be asked for it offline" in said
    assert not hub.asked


@pytest.mark.parametrize(
    ("name", "code", "of"), [("org/none", 404, "coefficients"), ("org/gated", 403, "check")]
)
def test_a_model_that_is_not_there_or_gated_is_one_sentence(name, code, of, call, hub, family):
    hub.gated.add("org/gated")
    said = call({**family, "a": name}, of=of, status=1).stderr
    assert said.removeprefix("Error: ").startswith(
        f"Model {name} is no directory here, and cannot be found on the hub ({code}"
    )
    assert said.count("Model") == 1


def test_models_that_are_kept_are_not_read_from_the_hub_again(
    measured, hub, family, on_disk, tmp_path
):
    for name in family.values():
        huggingface_hub.snapshot_download(name)
    assert measured(family) == measured(on_disk)
    assert len(weights_in(tmp_path / "cache")) == 8
    forget_files()
    hub.asked.clear()
    assert find(*family.values()) == []
    assert measured(family) == measured(on_disk)
    assert not [file for kind, file, _ in hub.asked if kind == "GET" and "safetensors" in file]


def test_what_cannot_be_read_in_parts_is_downloaded(hub, on_disk, copied, caplog):
    assert find("org/copy+org/adapter") == []
    assert "Model org/copy+org/adapter has an adapter, which is applied" in caplog.text
    for file in copied.glob("model*"):
        file.unlink()
    torch.save(read(on_disk["a"]), copied / "pytorch_model.bin")
    assert find("org/copy") == []
    assert "Model org/copy has no safetensors files, so MergeKit downloads it." in caplog.text


def test_an_adapter_is_checked_by_its_header(hub, on_disk, tmp_path):
    adapter = save_adapter(on_disk["base"], tmp_path / "lora")
    hub.put("org/whole", adapter)
    hub.put("org/part", shutil.copytree(adapter, tmp_path / "part"))
    tensors = {n.replace("q_proj", "wq"): t for n, t in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, tmp_path / "part" / WEIGHTS)
    hub.put("org/empty", on_disk["base"])
    found = {}
    for name in ("whole", "part", "empty"):
        model = ModelReference.model_validate(f"{on_disk['base']}+org/{name}")
        files = find_model_files(model, MergeOptions(lora_merge_cache=str(tmp_path / "lora-cache")))
        assert (files.adapter, files.problems) == (None, ())
        found[name] = bad_adapters(files, MergeOptions())
    assert (found["whole"], found["empty"]) == ([], [])
    assert found["part"][0].startswith("Adapter org/part holds tensor base_model.model.model.")
    asked = [part for kind, file, part in hub.asked if (kind, file) == ("GET", WEIGHTS)]
    assert asked
    assert all(asked)


def test_models_of_an_architecture_that_mergekit_infers_are_downloaded(hub, copied, caplog):
    file = copied / "config.json"
    file.write_text(file.read_text().replace("LlamaForCausalLM", "UnheardOfForCausalLM"))
    assert find("org/base", "org/copy") == []
    assert "does not know the architecture of model org/copy. It infers it" in caplog.text


CUT = f"/{SHARD} of model org/copy is truncated, or no safetensors file"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-1], CUT),
        (lambda data: data + b"x", CUT),
        (lambda data: b"version https://x", CUT),
        (lambda data: save({"new": torch.ones(1)}), f"in {SHARD}, which does not hold it"),
        (None, f"/{SHARD} of model org/copy is missing"),
    ],
)
def test_a_file_that_is_not_whole_or_not_there_is_refused(change, said, hub, copied):
    data = (copied / SHARD).read_bytes()
    (copied / SHARD).unlink()
    if change:
        (copied / SHARD).write_bytes(change(data))
    with pytest.raises(BadInputError) as failure:
        find("org/copy")
    assert failure.value.args[0].endswith(f"{said}; choose another revision.")


def test_what_is_pushed_between_plan_and_merge_is_measured_anew(hub, family, on_disk, tmp_path):
    """Models are of a commit; what was measured of another one says nothing."""
    config = merge_config(family, parameters={"granularity": "model"})
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    planned = mergekit_metagpt.plan(config, options=options)
    first = mergekit_metagpt.merge(config, tmp_path / "first", options=options)
    coefficients = [expert["coefficient"] for expert in first.record["experts"]]
    assert coefficients == list(planned.coefficients.values())
    commit = hub.put("org/a", on_disk["b"])
    second = mergekit_metagpt.merge(config, tmp_path / "second", options=options)
    assert [expert["coefficient"] for expert in second.record["experts"]] == [0.5, 0.5]
    revisions = {it["model"]: it["revision"] for it in second.record["inputs"]}
    assert revisions["org/a"] == commit
