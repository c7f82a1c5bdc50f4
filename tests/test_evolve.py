"""Evolution: the priors of MetaGPT as the genes of ``mergekit-evolve``."""

import os
from functools import cached_property, partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from conftest import VOCABULARY, merge_config, read
from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenome, ModelGenomeDefinition
from mergekit.merge import run_merge
from mergekit.merge_methods import registered_methods
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.checkpoints import Checkpoints


class Evaluator:
    """Merges genomes and scores the merges, as a worker of ``mergekit-evolve`` does.

    The score is the mean log-likelihood of what expert ``a``, which the closed form gives
    the smaller share, would continue random tokens with.
    """

    def __init__(self, paths, directory, method="metagpt", parameters=(), **settings):
        base, *experts = paths.values()
        definition = {"models": experts, "merge_method": method, "base_model": base, **settings}
        self.genome = ModelGenome(ModelGenomeDefinition.model_validate(definition))
        self.parameters = dict(parameters)
        self.out, self.expert = Path(directory, "merged"), paths["a"]
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(3, VOCABULARY, (8, 24), generator=generator)

    @cached_property
    def answers(self) -> torch.Tensor:
        return self.logits(self.expert).argmax(-1)

    def logits(self, model) -> torch.Tensor:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            return loaded(self.tokens).logits

    def merge(self, genotype) -> dict[str, torch.Tensor]:
        config = self.genome.genotype_merge_config(genotype)
        config.parameters.update(self.parameters)
        options = MergeOptions(quiet=True, copy_tokenizer=False, random_seed=0)
        run_merge(config, str(self.out), options)
        return read(self.out)

    def score(self, genotype) -> float:
        self.merge(genotype)
        logits = self.logits(self.out).flatten(0, 1)
        return -torch.nn.functional.cross_entropy(logits, self.answers.flatten()).item()

    def report(self, genotypes) -> tuple[int, int, list[float]]:
        """Return this process, how many surveys it took, and the scores."""
        survey = Checkpoints.survey
        with mock.patch.object(Checkpoints, "survey", autospec=True, side_effect=survey) as taken:
            scores = [self.score(genotype) for genotype in genotypes]
        return os.getpid(), taken.call_count, scores


@pytest.fixture
def evaluator(family, tmp_path):
    return partial(Evaluator, family, tmp_path)


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
def test_the_genes_are_priors_and_densities(method, settings, genes, family, evaluator, merge):
    one = evaluator(method, **{"normalize": False, **settings})
    genotype = one.genome.initial_genotype()
    config = merge_config(family, method, dtype="bfloat16", parameters={"normalize": False})
    if genes:
        genotype = torch.tensor(list(genes.values()), dtype=torch.float64)
        arrays = one.genome.genotype_to_param_arrays(genotype)
        assert {name: arrays[name].item() for name in arrays} == pytest.approx(genes)
        config["parameters"] = {"int8_mask": True} if method == "metagpt_ties" else {}
        for model, name in zip(config["models"], "ab", strict=True):
            model["parameters"] = {
                gene[2:]: value for gene, value in genes.items() if gene.startswith(name)
            }
    merged, expected = one.merge(genotype), merge(config)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.xdist_group("ray")
def test_workers_survey_once_for_all_of_their_genomes_and_score_alike(
    family, evaluator, tmp_path, cluster
):
    import ray

    genotypes = torch.tensor([[1.0, 1.0], [4.0, 1.0], [1.0, 4.0]])
    for granularity in ("tensor", "layer", "model"):
        parameters = {"granularity": granularity}
        process, surveys, expected = evaluator(parameters=parameters).report(genotypes)
        assert surveys == (granularity == "layer")  # which the cache has for model
        assert len(set(expected)) == 3
    remote = ray.remote(num_cpus=0.5)(Evaluator)
    workers = [remote.remote(family, tmp_path / n, parameters=parameters) for n in "ab"]
    reports = ray.get([worker.report.remote(genotypes) for worker in workers], timeout=120)
    assert len({process, *(its for its, _, _ in reports)}) == 3
    for _, surveys, scores in reports:
        assert surveys <= 1
        assert scores == pytest.approx(expected, abs=1e-6)
