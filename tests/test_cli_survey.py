"""``mergekit-metagpt survey``, and the files that other commands take and write."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers
from click.testing import CliRunner
from conftest import (
    command,
    llama_config,
    merge_config,
    put_nan,
    read,
    run,
    save_family,
    slices_config,
    write_yaml,
)

from mergekit_metagpt.cli import main
from mergekit_metagpt.measure.checkpoints import Checkpoints, survey_checkpoints
from mergekit_metagpt.method.session import SESSION


def invoke(*words, status: int = 0):
    """Run a command in this process, which knows of no survey before."""
    SESSION.surveys.clear()
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == status, done.output
    return done


@pytest.fixture
def unmeasured(monkeypatch):
    """Fail if a command measures checkpoints."""

    def fail(*_args, **_options):
        raise AssertionError("the models are measured again")

    return lambda: monkeypatch.setattr(Checkpoints, "survey", fail)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("three"), llama_config(), scales=(0.01, 0.03, 0.02))


def take(family: dict[str, str], file: Path) -> Path:
    invoke("survey", *family.values(), "-o", file)
    return file


def test_a_survey_file_holds_what_was_measured_exactly(three, tmp_path):
    base, *experts = three.values()
    held = json.loads(take(three, tmp_path / "survey.json").read_text())
    found = survey_checkpoints(base, experts, products=True, progress=False)
    assert held["schema_version"] == 1
    assert (held["base"], held["experts"]) == (base, experts)
    assert held["tensors"].keys() == found.squared_norms.keys()
    for name, tensor in held["tensors"].items():
        assert tuple(tensor["squared_norms"]) == found.squared_norms[name]
        assert tensor["products"] == found.grams[name]
        assert (tensor["dtype"], tensor["size"]) == ("float32", found.sizes[name])
    assert [model["model"] for model in held["inputs"]] == [base, *experts]


def test_the_record_of_a_merge_describes_models_as_a_survey_does(family, tmp_path):
    held = json.loads(take(family, tmp_path / "survey.json").read_text())
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(family))
    invoke("merge", config, tmp_path / "out", "--no-copy-tokenizer")
    record = json.loads((tmp_path / "out" / "metagpt.json").read_text())
    assert record["schema_version"] == held["schema_version"]
    assert record["inputs"] == sorted(held["inputs"], key=lambda model: model["model"])


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
def test_with_a_survey_nothing_is_measured_and_nothing_changes(
    granularity, three, tmp_path, unmeasured
):
    survey = take(three, tmp_path / "survey.json")
    # An expert fewer, and in another order.
    some = {name: three[name] for name in ("base", "c", "a")}
    config = merge_config(some, parameters={"granularity": granularity})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    coefficients = invoke("coefficients", yml, "--json").stdout
    resolved = invoke("resolve", yml).stdout
    invoke("merge", yml, tmp_path / "plain", "--no-copy-tokenizer")
    unmeasured()
    assert invoke("coefficients", yml, "--json", "--survey", survey).stdout == coefficients
    assert invoke("resolve", yml, "--survey", survey).stdout == resolved
    invoke("merge", yml, tmp_path / "quick", "--no-copy-tokenizer", "--survey", survey)
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("plain", "quick")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("words", [["coefficients"], ["resolve"], ["compare"], ["diagnose"]])
def test_every_command_that_measures_can_keep_the_survey(words, family, tmp_path):
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(family))
    kept = tmp_path / "kept.json"
    invoke(*words, config, "--save-survey", kept)
    assert kept.read_bytes() == take(family, tmp_path / "survey.json").read_bytes()


def test_a_merge_can_keep_the_survey_that_it_uses(family, tmp_path, unmeasured):
    config = merge_config(family, parameters={"granularity": "model"})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    kept = tmp_path / "kept.json"
    invoke("merge", yml, tmp_path / "out", "--no-copy-tokenizer", "--save-survey", kept)
    unmeasured()
    found = json.loads(invoke("coefficients", yml, "--json", "--survey", kept).stdout)
    record = json.loads((tmp_path / "out" / "metagpt.json").read_text())
    assert found["coefficients"] == record["coefficients"]


def test_slices_of_fewer_experts_take_their_part_of_the_survey(three, tmp_path, unmeasured):
    survey = take(three, tmp_path / "survey.json")
    config = slices_config(three, [[0, 2]], parameters={"granularity": "model"})
    few = slices_config({k: three[k] for k in ("base", "a", "b")}, [[2, 3]])
    config["slices"] += few["slices"]
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    expected = invoke("coefficients", yml, "--json").stdout
    unmeasured()
    assert invoke("coefficients", yml, "--json", "--survey", survey).stdout == expected


def test_models_are_recognized_where_they_were_moved_to(family, tmp_path, unmeasured):
    survey = take(family, tmp_path / "survey.json")
    moved = {name: str(shutil.copytree(path, tmp_path / name)) for name, path in family.items()}
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(moved))
    unmeasured()
    invoke("coefficients", yml, "--survey", survey)


def test_a_survey_is_refused_when_a_file_has_changed(tmp_path):
    paths = save_family(tmp_path, llama_config())
    survey = take(paths, tmp_path / "survey.json")
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    put_nan(paths["a"], "model.norm.weight")
    for words in (["coefficients", yml], ["merge", yml, tmp_path / "out"]):
        done = invoke(*words, "--survey", survey, status=1)
        assert f"Weight file model.safetensors of {paths['a']} has changed since" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_survey_is_refused_for_an_expert_that_it_lacks(three, tmp_path):
    survey = take({name: three[name] for name in ("base", "a", "b")}, tmp_path / "survey.json")
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(three))
    done = invoke("coefficients", yml, "--survey", survey, status=1)
    assert f"has no model with the weights of {three['c']}" in done.stderr


def test_a_survey_with_another_vocabulary_says_too_little_of_fewer_experts(tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.02, 0.03))
    for number, path in enumerate(paths.values()):
        words = {f"<{n}>" if n or number < 3 else "<other>": n for n in range(64)}
        core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<1>"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(path)
    survey = take(paths, tmp_path / "survey.json")
    assert json.loads(survey.read_text())["left_out"]
    invoke(
        "coefficients",
        write_yaml(tmp_path / "all.yml", merge_config(paths)),
        *("--survey", survey),
    )
    some = {name: paths[name] for name in ("base", "a", "b")}
    yml = write_yaml(tmp_path / "some.yml", merge_config(some))
    done = invoke("coefficients", yml, "--survey", survey, status=1)
    assert "take a survey of these alone" in done.stderr


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not a survey"),
        ("[]", "is not a survey"),
        ("{}", "is not a survey"),
        ('{"schema_version": 2}', "was written by a newer mergekit-metagpt"),
        ('{"schema_version": 1}', "is not a survey"),
    ],
)
def test_a_file_that_is_no_survey_is_refused(text, problem, family, tmp_path):
    (tmp_path / "survey.json").write_text(text)
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(family))
    done = invoke("coefficients", yml, "--survey", tmp_path / "survey.json", status=1)
    assert problem in done.stderr
    assert str(tmp_path / "survey.json") in done.stderr


@pytest.mark.parametrize("damage", ["inputs", "norms", "products", "dtype"])
def test_a_damaged_survey_is_refused(damage, family, tmp_path):
    held = json.loads(take(family, tmp_path / "survey.json").read_text())
    tensor = held["tensors"]["model.norm.weight"]
    if damage == "inputs":
        held["inputs"].pop()
    elif damage == "norms":
        tensor["squared_norms"].pop()
    elif damage == "products":
        tensor["products"][1].pop()
    else:
        tensor["dtype"] = "float99"
    (tmp_path / "survey.json").write_text(json.dumps(held))
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(family))
    done = invoke("coefficients", yml, "--survey", tmp_path / "survey.json", status=1)
    assert "is not a survey" in done.stderr


def test_a_survey_of_something_that_is_no_model_writes_nothing(family, tmp_path):
    done = invoke("survey", family["base"], tmp_path, "-o", tmp_path / "survey.json", status=1)
    assert str(tmp_path) in done.stderr
    assert not (tmp_path / "survey.json").exists()


def test_a_lora_expert_is_surveyed_as_it_is_merged(family, tmp_path):
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(family["base"])
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    adapter.save_pretrained(tmp_path / "lora")
    expert = f"{family['base']}+{tmp_path / 'lora'}"
    words = ["--lora-merge-cache", tmp_path / "cache"]
    survey = tmp_path / "survey.json"
    invoke("survey", family["base"], expert, family["a"], "-o", survey, *words)
    config = merge_config({"base": family["base"], "lora": expert, "a": family["a"]})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    expected = invoke("coefficients", yml, "--json", *words).stdout
    assert invoke("coefficients", yml, "--json", "--survey", survey, *words).stdout == expected


def test_the_commands_work_as_they_are_typed(three, tmp_path):
    survey = tmp_path / "survey.json"
    done = run(command("mergekit-metagpt"), "survey", *three.values(), "-o", survey)
    assert done.returncode == 0, done.stderr
    assert f"The survey is in {survey}." in done.stdout
    yml = write_yaml(
        tmp_path / "metagpt.yml", merge_config(three, parameters={"granularity": "model"})
    )
    out = tmp_path / "out"
    words = ["--survey", survey, "--no-copy-tokenizer"]
    done = run(command("mergekit-metagpt"), "merge", yml, out, *words)
    assert done.returncode == 0, done.stderr
    assert "Measuring" not in done.stderr
    assert read(out).keys() == read(three["base"]).keys()
