"""Surveys of checkpoints: headers, what counts, which errors are raised, how often one is taken."""

import json
import os
import sys
from pathlib import Path

import pytest
import reference
import torch
from conftest import (
    checkpoints,
    edit,
    llama_config,
    merge_config,
    read,
    run,
    save_family,
    slices_config,
)
from mergekit.merge_methods import merge_state_dicts
from mergekit.merge_methods.base import TensorGroup
from safetensors.torch import save_file

from mergekit_metagpt import scaling_coefficients
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.measure import headers, surveys
from mergekit_metagpt.measure.headers import Header, read_header
from mergekit_metagpt.measure.loaders import forget_files
from mergekit_metagpt.measure.provider import StoredModels
from mergekit_metagpt.measure.survey import Measured, Survey
from mergekit_metagpt.measure.surveys import SURVEYS
from mergekit_metagpt.method.merge_method import MetaGPTMerge
from mergekit_metagpt.method.notes import noted
from mergekit_metagpt.names import layer_of

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TENSORS = {
    "model.layers.0.w": torch.ones(3, 4),
    "model.norm": torch.ones(5, dtype=torch.bfloat16),
    "none": torch.ones(0, 2),
    "one": torch.tensor(1),
}


def survey(paths, **options):
    return checkpoints(paths).survey(progress=False, **options)


def test_norms_and_cosines_are_those_of_float64(family):
    found = survey(family, products=True)
    base, *experts = map(read, family.values())
    vectors = [
        torch.cat([(e[name].double() - base[name].double()).flatten() for name in base])
        for e in experts
    ]
    expected = torch.nn.functional.cosine_similarity(*vectors, dim=0).item()
    rows = [1, expected], [expected, 1]
    assert found.cosines == [pytest.approx(row, rel=1e-5) for row in rows]
    norms = reference.squared_norms(base, experts)
    plain = survey(family)
    assert found.parameters == sum(tensor.numel() for tensor in base.values())
    for name, it in found.tensors.items():  # of each tensor alone; their sum is the model's
        diagonal = [row[t] for t, row in enumerate(it.products)]
        assert diagonal == pytest.approx(norms[name], rel=1e-6)
        assert it.norms == plain.tensors[name].norms
        assert it.size == base[name].numel()


def nested(tensors, path):
    torch.save({"state_dict": tensors, "epoch": 3}, path)


@pytest.mark.parametrize("save", [save_file, torch.save, nested])
def test_a_base_is_described_without_its_data(save, tmp_path):
    path = tmp_path / ("model.safetensors" if save is save_file else "pytorch_model.bin")
    save(TENSORS, path)
    found = read_header(str(path), "some model")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].shape, found[name].torch_dtype) == (tensor.shape, tensor.dtype)
    for base in (str(path), str(tmp_path)):
        models = StoredModels(checkpoints({"base": base, "a": base}), quiet=True)
        assert models.parameters == 12 + 5 + 1
        assert models.shape_of("model.layers.7.w") == (3, 4)
        assert models.shape_of("lost") is None
    forget_files()


def test_a_header_is_read_again_only_if_the_file_changes(tmp_path, monkeypatch):
    path = str(tmp_path / "model.safetensors")
    save_file({"w": torch.zeros(4)}, path)
    first = read_header(path, "m")["w"]
    before = Path(path).stat()
    save_file({"w": torch.zeros(2, 2)}, str(tmp_path / "new"))
    with monkeypatch.context() as patch:
        patch.setattr(headers, "safe_open", None)
        assert read_header(path, "m")["w"] == first == Header((4,), "F32", path)
    (tmp_path / "new").replace(path)  # of another inode
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_header(path, "m")["w"].shape == (2, 2)


class TestTies:
    @pytest.mark.parametrize(
        ("heads", "by", "tied"),
        [("", 0, {HEAD: TABLE}), (["base", *"ab"], 0, {HEAD: TABLE}), ("a", 0.5, {})],
    )
    def test_they_count_once_unless_an_expert_has_a_head_of_its_own(
        self, heads, by, tied, tmp_path
    ):
        paths = save_family(tmp_path, llama_config(tie_word_embeddings=True))
        for name in heads:
            edit(paths[name], lambda tensors: tensors.update({HEAD: tensors[TABLE] + by}))
        found = survey(paths)
        assert found.tied == tied
        assert {TABLE, HEAD} & found.tensors.keys() == {TABLE, HEAD} - tied.keys()

    def test_frozen_tensors_are_not_taken_for_tied_ones(self, own):
        original = read(own["base"])
        for name in ("a", "b"):
            edit(own[name], lambda tensors: tensors.update({n: original[n] for n in (TABLE, HEAD)}))
        assert survey(own).tensors[HEAD].norms == (0.0, 0.0)

    def test_a_layer_that_shares_its_weights_has_the_coefficients_of_the_first(self):
        stored = {"layers.0.w": Measured((4.0,), torch.float32, 5)}
        found = Survey(("a",), stored, {"layers.1.w": "layers.0.w"})
        alone = TensorInputs("layers.1.w", "base", torch.zeros(1), ("a",), (torch.ones(1),))
        assert found.norms_of(alone, "layer") == (4.0,)


def test_a_vocabulary_of_another_size_is_left_out_and_logged(own, caplog):
    """One with other tokens is, too: see test_surveys.py."""
    for name in (TABLE, HEAD):
        edit(own["a"], lambda it, n=name: it.update({n: torch.cat([it[n], torch.ones(4, 32)])}))
    found = SURVEYS.survey_of(checkpoints(own))
    assert found.left_out.keys() == {TABLE, HEAD}
    assert "has shape [68, 32]" in caplog.text
    assert "does not count" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"b lacks tensor model\.norm\.weight"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}),
            r"model\.norm\.weight has shape \[5\] in expert .*/b",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change, said, own):
    edit(own["b"], change)
    with pytest.raises(ValueError, match=said):
        survey(own)


class TestSlices:
    @pytest.mark.parametrize("granularity", ["layer", "model"])
    def test_that_keep_their_place_merge_like_the_whole(self, granularity, family, merge):
        parameters = {"granularity": granularity}
        sliced = merge(slices_config(family, [[0, 2]], [[2, 3]], parameters=parameters))
        whole = merge(merge_config(family, parameters=parameters))
        assert all(torch.equal(sliced[name], whole[name]) for name in whole)

    @pytest.mark.parametrize(
        ("layer_ranges", "dtype"),
        [
            ([[[0, 1]], [[2, 3]]], None),  # a layer is left out, and the next one moves up
            ([[[0, 1]], [[2, 3]]], "bfloat16"),
            ([[[0, 2], [1, 3]]], None),  # an expert's layers meet different layers of the base
            ([[[0, 2], [1, 3]]], "bfloat16"),
            ([[[0, 3]], [[0, 3]]], None),  # deeper than the base
        ],
    )
    def test_that_move_layers_are_refused_at_layer(self, layer_ranges, dtype, family, merge):
        config = slices_config(family, *layer_ranges, dtype=dtype)
        with pytest.raises(ValueError, match=r"Granularity layer cannot choose.*granularity: tens"):
            merge({**config, "parameters": {"granularity": "layer"}}, clone_tensors=True)

    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_beyond_the_base_have_the_same_coefficients(self, dtype, family, merge, passes):
        parameters = {"granularity": "model"}
        config = slices_config(family, [[0, 3]], [[0, 3]], parameters=parameters, dtype=dtype)
        with noted() as entries:
            merge(config, clone_tensors=True)
        assert "model.layers.5.mlp.up_proj.weight" in {entry.tensor for entry in entries}
        assert len({entry.coefficients for entry in entries}) == 1
        assert len(passes) == 1


@pytest.mark.parametrize(
    ("granularity", "dtype"),
    [("layer", None), ("layer", "bfloat16"), ("model", "bfloat16"), ("model", "float64")],
)
def test_one_merge_has_one_set_of_coefficients(granularity, dtype, tmp_path, merge, passes):
    """That of the models as they are stored, even if `dtype` rounds them before the merge."""
    paths = save_family(tmp_path, llama_config(), scales=(0.001, 0.002), dtype=torch.bfloat16)

    def widen(tensors):
        generator = torch.Generator().manual_seed(len(tensors[HEAD].unique()))
        for name in (TABLE, HEAD):
            noise = torch.rand(tensors[name].shape, generator=generator)
            tensors[name] = tensors[name].float() + 0.01 * noise

    for path in paths.values():
        edit(path, widen)
    with noted() as entries:
        merge(merge_config(paths, parameters={"granularity": granularity}, dtype=dtype))
    assert len(passes) == 1
    used = {(entry.scope, entry.coefficients) for entry in entries}
    assert len(dict(used)) == len(used)
    found = survey(paths)
    norms = {"layer": found.layers, "model": {"model": found.model}}[granularity]
    expected = {(scope, tuple(scaling_coefficients(row))) for scope, row in norms.items()}
    assert {pair for pair in used if granularity == "model" or layer_of(pair[0] + ".")} == expected


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_a_merge_of_files_that_change_meanwhile_is_refused(granularity, own, merge, monkeypatch):
    monkeypatch.setattr(surveys, "_SECONDS_BETWEEN_LOOKS", 0.0)
    merge_group = MetaGPTMerge.merge_group
    merged = []

    def then_write(self, group, **parameters):
        result = merge_group(self, group, **parameters)
        if not merged:
            edit(own["b"], lambda tensors: tensors[HEAD].mul_(2))
        merged.append(group.metadata.name)
        return result

    monkeypatch.setattr(MetaGPTMerge, "merge_group", then_write)
    with pytest.raises(ValueError, match=rf"{own['b']}/model\.safetensors has changed since"):
        merge(merge_config(own, parameters={"granularity": granularity}))
    assert len(merged) == 1


def test_state_dicts_are_surveyed_as_they_are():
    generator = torch.Generator().manual_seed(0)
    models = [
        {f"layers.{n}.w": torch.randn(50, generator=generator) for n in range(3)} for _ in range(3)
    ]
    merged = merge_state_dicts(
        models, "metagpt", base=0, parameters={"granularity": "layer"}, dtype=torch.bfloat16
    )
    expected = reference.coefficients(models[0], models[1:], "layer")
    base, *experts = ({name: t.bfloat16() for name, t in m.items()} for m in models)
    reference.assert_merged(merged, base, experts, expected)


def test_groups_without_a_base_are_refused():
    group = TensorGroup.from_tensors([torch.ones(3)], name="w")
    with pytest.raises(ValueError, match="Tensor w has no base; set base_model"):
        TensorInputs.of(group)


# Prints the peaks of a process that merges twice, in bytes.
PEAKS = """
import json, sys
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

out, *configs = sys.argv[1:]
options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
for config in configs:
    Path("/proc/self/clear_refs").write_text("5")
    run_merge(MergeConfiguration.model_validate_json(config), out, options)
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
"""


def test_a_survey_needs_less_memory_than_the_two_largest_tensors(tmp_path):
    """The merge begins with the tied tensor, which is in the first of several files."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not forget the peak")
    sizes = {"vocab_size": 12_000, "hidden_size": 512, "intermediate_size": 1536}
    config = llama_config(**sizes, tie_word_embeddings=True)
    paths = save_family(tmp_path, config, max_shard_size="40MB")
    configs = [merge_config(paths, parameters={"granularity": g}) for g in ("tensor", "layer")]
    # In a process of its own, since others leave free memory behind.
    done = run(sys.executable, "-c", PEAKS, tmp_path / "out", *map(json.dumps, configs))
    tensor, layer = map(int, done.stdout.split())
    assert layer - tensor < 2 * 4 * 12_000 * 512
