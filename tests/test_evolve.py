"""Evolution: the priors of MetaGPT as the genes of ``mergekit-evolve``."""

import pytest
import torch
from conftest import merge_config
from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenome, ModelGenomeDefinition
from mergekit.merge_methods import registered_methods


def test_every_method_may_evolve_and_density_where_there_is_one():
    own = [m.spec.name for m in registered_methods() if m.spec.name.startswith("metagpt")]
    for name in own:
        assert METHOD_PARAM_MAPS[name] == ["weight"] + ["density"] * (name != "metagpt")
    assert METHOD_PARAM_MAPS["ties"] == ["weight", "density"]
    assert METHOD_PARAM_MAPS["slerp"] == ["t"]


@pytest.mark.parametrize(
    ("method", "settings", "genes"),
    [
        # The first genome of mergekit-evolve gives equal weights, which are equal priors.
        ("metagpt", {}, {}),
        ("metagpt", {"layer_granularity": 1}, {}),
        ("metagpt_ties", {"filters": ["mlp"]}, {}),
        ("metagpt", {}, {"a_weight": 3.0, "b_weight": 0.5}),
        (
            "metagpt_ties",
            {"normalize": True},
            {"a_weight": 3.0, "a_density": 0.4, "b_weight": 0.5, "b_density": 0.8},
        ),
    ],
)
def test_the_genes_are_priors_and_densities(method, settings, genes, family, merge):
    base, *experts = family.values()
    definition = {"models": experts, "merge_method": method, "base_model": base, **settings}
    genome = ModelGenome(ModelGenomeDefinition.model_validate({"normalize": False, **definition}))
    genotype = genome.initial_genotype()
    config = merge_config(family, method, dtype="bfloat16", parameters={"normalize": False})
    if genes:
        genotype = torch.tensor(list(genes.values()), dtype=torch.float64)
        arrays = genome.genotype_to_param_arrays(genotype)
        assert {name: arrays[name].item() for name in arrays} == pytest.approx(genes)
        config["parameters"] = {"int8_mask": True} if method == "metagpt_ties" else {}
        for model, name in zip(config["models"], "ab", strict=True):
            model["parameters"] = {
                gene[2:]: value for gene, value in genes.items() if gene.startswith(name)
            }
    evolved = genome.genotype_merge_config(genotype).model_dump(exclude_none=True)
    merged, expected = merge(evolved), merge(config)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
