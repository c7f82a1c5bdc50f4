"""Surveys of checkpoints: what counts, which errors are raised, how often one is taken."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import reference
import tokenizers
import torch
import transformers
from conftest import (
    VOCABULARY,
    llama_config,
    merge_config,
    put_nan,
    read,
    save_family,
    slices_config,
)
from mergekit.io.tasks import LoadTensor
from mergekit.merge_methods import get, merge_state_dicts
from mergekit.merge_methods.base import TensorGroup
from safetensors.torch import load_file, save_file

from benchmarks.timing import Case
from mergekit_metagpt import scaling_coefficients
from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.measure import surveys
from mergekit_metagpt.measure.checkpoints import Checkpoints, survey_checkpoints
from mergekit_metagpt.measure.survey import Survey, survey_groups
from mergekit_metagpt.method.merge_method import MetaGPTMerge
from mergekit_metagpt.method.notes import noted
from mergekit_metagpt.names import canonical, layer_of


def survey(paths, **options):
    experts = [path for name, path in paths.items() if name != "base"]
    return survey_checkpoints(paths["base"], experts, progress=False, **options)


def edit(model: str | Path, change) -> None:
    """Change the tensors of a checkpoint that has one weight file."""
    file = Path(model) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def save_tokenizer(model: str, tokens: list[str]) -> None:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=tokens[0]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(model)


def test_every_tensor_is_measured_as_float64_does(family):
    found = survey(family)
    base, *experts = map(read, family.values())
    expected = reference.squared_norms(base, experts)
    assert found.squared_norms.keys() == expected.keys()
    for name, row in expected.items():
        assert found.squared_norms[name] == pytest.approx(row, rel=1e-6)
    assert found.model == pytest.approx(sum(expected.values()), rel=1e-6)
    layers = {f"model.layers.{n}" for n in range(3)}
    assert found.layers.keys() == layers
    for layer in layers:
        rows = [row for name, row in expected.items() if name.startswith(layer + ".")]
        assert found.layers[layer] == pytest.approx(sum(rows), rel=1e-6)


def test_cosines_are_those_of_the_whole_task_vectors(family):
    found = survey(family, products=True)
    base, *experts = map(read, family.values())
    vectors = [
        torch.cat([(e[name].double() - base[name].double()).flatten() for name in base])
        for e in experts
    ]
    expected = torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0).item()
    assert found.cosines == [
        pytest.approx([1, expected], rel=1e-5),
        pytest.approx([expected, 1], rel=1e-5),
    ]
    assert found.squared_norms == survey(family).squared_norms
    assert found.parameters == sum(tensor.numel() for tensor in base.values())
    for name, gram in found.grams.items():  # of each tensor alone; their sum is the model's
        assert [row[t] for t, row in enumerate(gram)] == pytest.approx(
            found.squared_norms[name], rel=1e-6
        )
        assert found.sizes[name] == base[name].numel()
    with pytest.raises(ValueError, match="holds no inner products"):
        _ = survey(family).cosines


def test_a_survey_gives_theorem_10(family):
    base, *experts = map(read, family.values())
    expected = reference.coefficients(base, experts, "model")["model.norm.weight"]
    assert scaling_coefficients(survey(family).model) == pytest.approx(expected, rel=1e-6)


def test_layers_are_read_from_names():
    assert layer_of("model.layers.11.self_attn.q_proj.weight") == "model.layers.11"
    assert layer_of("h.0.attn.bias") == "h.0"
    assert layer_of("0.weight") == "0"
    assert layer_of("encoder.block.1.layer.0.SelfAttention.q.weight") == "encoder.block.1"
    assert layer_of("lm_head.weight") is None
    assert layer_of(None) is None


def test_the_canonical_order_is_that_of_the_ids():
    assert canonical(["b", "a"]) == canonical(["a", "b"]) == ["a", "b"]
    assert canonical([1, "1", 0]) == canonical(["1", 0, 1])


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_a_merge_takes_one_survey_and_a_second_merge_none(granularity, family, merge, passes):
    config = merge_config(family, parameters={"granularity": granularity})
    first = merge(config)
    second = merge({**config, "models": config["models"][::-1]})
    assert len(passes) == 1
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_granularity_tensor_takes_no_survey(family, merge, passes):
    merge(merge_config(family))
    assert not passes


@pytest.mark.parametrize("replace", [True, False], ids=["replaced", "written in place"])
def test_changed_files_are_surveyed_again(replace, merge, passes, tmp_path):
    paths = save_family(tmp_path, llama_config())
    config = merge_config(paths, parameters={"granularity": "model"})
    merge(config)
    file = Path(paths["a"], "model.safetensors")
    changed = {name: tensor * 1.1 for name, tensor in load_file(file).items()}
    target = tmp_path / "new.safetensors" if replace else file
    save_file(changed, target, metadata={"format": "pt"})
    os.replace(target, file)
    merged = merge(config)
    assert len(passes) == 2
    base, expert = read(paths["base"]), read(paths["b"])
    expected = reference.coefficients(base, [changed, expert], "model")
    reference.assert_merged(merged, base, [changed, expert], expected)


def test_threads_that_merge_one_model_share_one_survey(family, passes):
    method = get("metagpt")
    groups = groups_of(family)
    parameters = {
        "granularity": "model",
        "exponent": 2.0,
        "lambda": 1.0,
        "weight": {e.id: 1.0 for e in groups[0].non_base},
    }
    with ThreadPoolExecutor(8) as pool:
        merged = list(pool.map(lambda group: method.merge_group(group, **parameters), groups))
    assert len(passes) == 1
    serial = [method.merge_group(group, **parameters) for group in groups]
    assert all(torch.equal(a, b) for a, b in zip(merged, serial, strict=True))


def groups_of(paths, **kwargs):
    """Return the groups that MergeKit's executor would pass to the method, in one list."""
    models = Checkpoints.of(paths["base"], [p for n, p in paths.items() if n != "base"]).models
    tensors = [read(str(model)) for model in models]
    return [
        TensorGroup.from_tensors([t[name] for t in tensors], ids=models, base_index=0, name=name)
        for name in tensors[0]
    ]


@pytest.mark.parametrize("method", ["metagpt_dare_linear", "metagpt_della"])
def test_threads_and_order_do_not_change_random_masks(method, family):
    method, groups = get(method), groups_of(family)
    parameters = {
        "granularity": "tensor", "exponent": 2.0, "lambda": 1.0, "normalize": False,
        "rescale": True, "int8_mask": False,
    }  # fmt: skip
    for name, value in {"weight": 1.0, "density": 0.5, "epsilon": 0.1}.items():
        parameters[name] = {entry.id: value for entry in groups[0].entries}
    torch.manual_seed(11)
    before = torch.get_rng_state()
    serial = [method.merge_group(group, **parameters) for group in groups]
    backwards = [method.merge_group(group, **parameters) for group in reversed(groups)]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda group: method.merge_group(group, **parameters), groups))
    for one, two, three in zip(serial, reversed(backwards), parallel, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert torch.equal(torch.get_rng_state(), before)


def tied_family(directory: Path, stored_twice: bool) -> dict[str, str]:
    paths = save_family(directory, llama_config(tie_word_embeddings=True))
    for path in paths.values():

        def store(tensors):
            assert "lm_head.weight" not in tensors
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

        if stored_twice:
            edit(path, store)
    return paths


@pytest.mark.parametrize("stored_twice", [False, True])
def test_tied_tensors_count_once(stored_twice, tmp_path):
    paths = tied_family(tmp_path, stored_twice)
    found = survey(paths)
    assert "lm_head.weight" not in found.squared_norms
    assert "model.embed_tokens.weight" in found.squared_norms


def test_an_untied_expert_of_a_tied_base_counts_both(tmp_path):
    paths = tied_family(tmp_path, stored_twice=False)
    edit(
        paths["a"],
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0.5}),
    )
    assert "lm_head.weight" in survey(paths).squared_norms


def test_a_vocabulary_of_another_size_is_left_out_and_logged(tmp_path, caplog, merge):
    paths = save_family(tmp_path, llama_config())
    larger = transformers.LlamaForCausalLM(llama_config(vocab_size=VOCABULARY + 4))
    larger.load_state_dict(
        {
            name: torch.cat([tensor, torch.ones(4, tensor.shape[1])])
            if "embed" in name or "head" in name
            else tensor
            for name, tensor in read(paths["a"]).items()
        }
    )
    larger.save_pretrained(paths["a"])
    names = [f"t{n}" for n in range(VOCABULARY + 4)]
    for name, path in paths.items():
        save_tokenizer(path, names[: VOCABULARY + 4 if name == "a" else VOCABULARY])
    found = survey(paths)
    assert set(found.left_out) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "has shape [68, 32]" in caplog.text
    assert "does not count" in caplog.text
    config = merge_config(paths, parameters={"granularity": "model"}, tokenizer={"source": "base"})
    merged = merge(config)
    base, *experts = (
        {
            k: v[:VOCABULARY]
            if v.ndim == 2 and v.shape[1] == 32 and ("embed" in k or "head" in k)
            else v
            for k, v in read(path).items()
        }
        for path in paths.values()
    )
    inner = {name for name in base if "embed" not in name and "head" not in name}
    by_model = reference.coefficients(
        {n: base[n] for n in inner}, [{n: e[n] for n in inner} for e in experts], "model"
    )
    shared = by_model["model.norm.weight"]
    reference.assert_merged(merged, base, experts, dict.fromkeys(base, shared))


def test_a_vocabulary_with_other_tokens_is_left_out_and_logged(tmp_path, caplog):
    paths = save_family(tmp_path, llama_config())
    names = [f"t{n}" for n in range(VOCABULARY)]
    save_tokenizer(paths["base"], names)
    save_tokenizer(paths["a"], names)
    assert not survey(paths).left_out
    save_tokenizer(paths["b"], names[::-1])
    assert set(survey(paths).left_out) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "different meanings" in caplog.text


def test_a_missing_tensor_is_named(tmp_path, merge):
    paths = save_family(tmp_path, llama_config())
    edit(paths["b"], lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        ValueError, match=rf"{paths['b']} lacks tensor model\.layers\.1\.mlp\.up_proj"
    ):
        survey(paths)
    # In a merge, MergeKit reads the tensor first, so the message is MergeKit's.
    with pytest.raises(RuntimeError, match=rf"up_proj\.weight required but .* model {paths['b']}"):
        merge(merge_config(paths, parameters={"granularity": "model"}))


def test_a_tensor_of_another_shape_is_named(tmp_path):
    paths = save_family(tmp_path, llama_config())
    edit(paths["b"], lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \[5\] in expert .*/b"):
        survey(paths)


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
@pytest.mark.parametrize("model", ["base", "b"])
def test_nan_stops_the_merge_and_is_named(granularity, model, tmp_path, merge):
    paths = save_family(tmp_path, llama_config())
    put_nan(paths[model], "model.norm.weight")
    with pytest.raises(ValueError, match=rf"model\.norm\.weight of model {paths[model]} holds NaN"):
        merge(merge_config(paths, parameters={"granularity": granularity}))


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
def test_slices_that_keep_their_place_merge_like_the_whole(granularity, family, merge):
    parameters = {"granularity": granularity}
    sliced = merge(slices_config(family, [[0, 2]], [[2, 3]], parameters=parameters))
    whole = merge(merge_config(family, parameters=parameters))
    assert all(torch.equal(sliced[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "layer_ranges",
    [
        [[[0, 1]], [[2, 3]]],  # a layer is left out, and the next one moves up
        [[[0, 2], [1, 3]]],  # an expert's layers meet different layers of the base
        [[[0, 3]], [[0, 3]]],  # deeper than the base
    ],
)
def test_layer_refuses_slices_that_move_layers(layer_ranges, family, merge):
    config = slices_config(family, *layer_ranges)
    with pytest.raises(ValueError, match=r"Granularity layer cannot choose.*granularity: tensor"):
        merge({**config, "parameters": {"granularity": "layer"}}, clone_tensors=True)
    for granularity in ("tensor", "model"):
        merge({**config, "parameters": {"granularity": granularity}}, clone_tensors=True)


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_checkpoints_are_surveyed_as_they_are_stored(granularity, tmp_path, merge):
    """Even if `dtype` rounds the task vectors before the merge."""
    paths = save_family(tmp_path, llama_config(), scales=(0.001, 0.002))
    merged = merge(merge_config(paths, parameters={"granularity": granularity}, dtype="bfloat16"))
    base, *experts = (read(path) for path in paths.values())
    expected = reference.coefficients(base, experts, granularity)
    rounded, *others = (
        {name: tensor.bfloat16() for name, tensor in model.items()} for model in (base, *experts)
    )
    if granularity == "layer":  # a tensor outside the layers has its own scope
        by_tensor = reference.coefficients(rounded, others, "tensor")
        expected |= {n: c for n, c in by_tensor.items() if layer_of(n) is None}
    reference.assert_merged(merged, rounded, others, expected)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_one_merge_has_one_set_of_coefficients(granularity, dtype, tmp_path, merge, passes):
    """The first tensor to be merged and the stored dtypes make no difference."""
    paths = save_family(tmp_path, llama_config(), scales=(0.001, 0.002), dtype=torch.bfloat16)

    def widen(tensors):
        generator = torch.Generator().manual_seed(len(tensors["lm_head.weight"].unique()))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            noise = torch.rand(tensors[name].shape, generator=generator)
            tensors[name] = tensors[name].float() + 0.01 * noise

    for path in paths.values():
        edit(path, widen)
    with noted() as entries:
        merge(merge_config(paths, parameters={"granularity": granularity}, dtype=dtype))
    scope = GRANULARITIES[granularity].scope
    used: dict[str, set[tuple[float, ...]]] = {}
    for entry in entries:
        used.setdefault(scope(entry.tensor), set()).add(entry.coefficients)
    assert all(len(rows) == 1 for rows in used.values())
    assert len(passes) == 1
    if granularity == "model":
        assert used == {"model": {tuple(scaling_coefficients(survey(paths).model))}}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_layers_beyond_the_base_have_the_same_coefficients(dtype, tmp_path, merge, passes):
    paths = save_family(tmp_path, llama_config(), scales=(0.001, 0.002))
    config = slices_config(paths, [[0, 3]], [[0, 3]], parameters={"granularity": "model"})
    with noted() as entries:
        merge({**config, "dtype": dtype}, clone_tensors=True)
    assert "model.layers.5.mlp.up_proj.weight" in {entry.tensor for entry in entries}
    assert len({entry.coefficients for entry in entries}) == 1
    assert len(passes) == 1


def test_names_are_looked_up_in_the_index_not_in_mergekits_labels(family, monkeypatch):
    """MergeKit orders tasks by a label, which could be the shard that a tensor is in."""
    expected = survey(family)
    monkeypatch.setattr(LoadTensor, "group_label", lambda self: "model-050pct")
    assert survey(family) == expected
    assert len(expected.squared_norms) == len(read(family["base"]))


def test_layer_refuses_moved_layers_also_where_dtype_rounds_them(tmp_path, merge):
    paths = save_family(tmp_path, llama_config())
    config = slices_config(paths, [[0, 1]], [[2, 3]], parameters={"granularity": "layer"})
    with pytest.raises(ValueError, match="Granularity layer cannot choose"):
        merge({**config, "dtype": "bfloat16"}, clone_tensors=True)


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_values_beyond_the_range_of_dtype_are_named(granularity, tmp_path, merge):
    paths = save_family(tmp_path, llama_config())
    name = "model.layers.1.mlp.up_proj.weight"
    edit(paths["a"], lambda tensors: tensors[name].view(-1)[:1].fill_(1e6))
    with pytest.raises(ValueError, match=rf"{name} of model {paths['a']} holds NaN or Inf in"):
        merge(merge_config(paths, parameters={"granularity": granularity}, dtype="float16"))


def test_layers_that_share_their_weights_share_the_coefficients(tmp_path, merge):
    paths = save_family(tmp_path, llama_config())

    def share(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    for path in paths.values():
        edit(path, share)
    found = survey(paths)
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    survey_of_layers = Survey(
        ("a",), {"layers.0.w": (4.0,), "layers.1.v": (1.0,)}, {"layers.1.w": "layers.0.w"}
    )
    assert survey_of_layers.counted_as("layers.1.w") == "layers.0.w"
    base = {"layers.0.w": torch.zeros(5), "layers.1.v": torch.zeros(3)}
    experts = [{n: torch.full_like(t, c) for n, t in base.items()} for c in (1.0, 2.0)]
    models = [{**m, "layers.1.w": m["layers.0.w"]} for m in (base, *experts)]
    merged = merge_state_dicts(models, "metagpt", base=0, parameters={"granularity": "layer"})
    assert torch.equal(merged["layers.1.w"], merged["layers.0.w"])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_merge_of_files_that_change_meanwhile_is_refused(
    granularity, tmp_path, merge, monkeypatch
):
    paths = save_family(tmp_path, llama_config())
    monkeypatch.setattr(surveys, "_SECONDS_BETWEEN_LOOKS", 0.0)
    merge_group = MetaGPTMerge.merge_group
    merged = []

    def then_write(self, group, **parameters):
        result = merge_group(self, group, **parameters)
        if not merged:
            edit(paths["b"], lambda tensors: tensors["lm_head.weight"].mul_(2))
        merged.append(group.metadata.name)
        return result

    monkeypatch.setattr(MetaGPTMerge, "merge_group", then_write)
    with pytest.raises(ValueError, match=rf"{paths['b']}/model\.safetensors has changed since"):
        merge(merge_config(paths, parameters={"granularity": granularity}))
    assert len(merged) == 1


def test_files_are_looked_at_once_a_second(family, merge, monkeypatch):
    monkeypatch.setattr(surveys.time, "monotonic", lambda: 0.0)
    looks = []
    original = surveys.require_unchanged
    monkeypatch.setattr(
        surveys, "require_unchanged", lambda before: looks.append(before) or original(before)
    )
    merge(merge_config(family, parameters={"granularity": "layer"}))
    assert len(looks) == 2  # before and after the survey
    merge(merge_config(family, parameters={"granularity": "layer"}))
    assert len(looks) == 3  # before it is found in the cache


def test_the_experts_of_a_survey_are_in_the_order_given(family):
    names = [family["b"], family["a"]]
    found = survey_checkpoints(family["base"], names, progress=False, products=True)
    assert [str(expert) for expert in found.experts] == names
    turned = survey_checkpoints(family["base"], names[::-1], progress=False, products=True)
    assert found.model == turned.model[::-1]
    assert found.products == tuple(row[::-1] for row in turned.products[::-1])
    groups = [
        TensorGroup.from_tensors(
            [torch.zeros(2), torch.ones(2), torch.full([2], 2.0)], ids=["0", "z", "a"], base_index=0
        )
    ]
    in_memory = survey_groups(groups)
    assert (in_memory.experts, in_memory.model) == (("z", "a"), (2.0, 8.0))


def test_state_dicts_are_surveyed_as_they_are():
    generator = torch.Generator().manual_seed(0)
    base, a, b = (
        {f"layers.{n}.w": torch.randn(50, generator=generator) for n in range(3)} for _ in range(3)
    )
    models = [base, a, b]
    merged = merge_state_dicts(
        models, "metagpt", base=0, parameters={"granularity": "layer"}, dtype=torch.bfloat16
    )
    expected = reference.coefficients(base, [a, b], "layer")
    base, *experts = ({name: t.bfloat16() for name, t in m.items()} for m in models)
    reference.assert_merged(merged, base, experts, expected)


def test_groups_without_a_base_are_refused():
    group = TensorGroup.from_tensors([torch.ones(3)], name="w")
    with pytest.raises(ValueError, match="Tensor w has no base; set base_model"):
        survey_groups([group])


def test_frozen_tensors_are_not_taken_for_tied_ones(tmp_path):
    paths = save_family(tmp_path, llama_config())
    original = read(paths["base"])

    def freeze(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = original[name]

    for name in ("a", "b"):
        edit(paths[name], freeze)
    found = survey(paths)
    assert found.squared_norms["lm_head.weight"] == (0.0, 0.0)


def test_the_progress_bar_can_be_switched_off(family, capfd):
    experts = [family["a"], family["b"]]
    survey_checkpoints(family["base"], experts)
    assert "Measuring task vectors" in capfd.readouterr().err
    survey_checkpoints(family["base"], experts, progress=False)
    assert "Measuring" not in capfd.readouterr().err


def test_a_survey_needs_less_memory_than_the_two_largest_tensors(tmp_path):
    # The merge begins with the tied tensor, which is in the first of several files.
    config = llama_config(
        vocab_size=12_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        tie_word_embeddings=True,
    )
    family = save_family(tmp_path, config, (0.01, 0.02, 0.03), max_shard_size="50MB")
    paths = [Path(path) for path in family.values()]
    largest = max(tensor.nbytes for tensor in read(paths[0]).values())

    def peak(granularity: str) -> float:
        case = Case(granularity, "metagpt", parameters={"granularity": granularity})
        return case.run(paths, "float32")["peak_bytes"]

    without = peak("tensor")
    assert peak("layer") - without < 2 * largest
    assert peak("model") - without < 2 * largest
