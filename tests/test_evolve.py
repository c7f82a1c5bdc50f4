"""Evolution: the priors of MetaGPT as the genes of ``mergekit-evolve``."""

import importlib
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
import transformers
from conftest import VOCABULARY, merge_config, read, run
from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenome, ModelGenomeDefinition
from mergekit.merge import run_merge
from mergekit.merge_methods import registered_methods
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.method.session import SESSION


def genome_of(paths, method="metagpt", **settings) -> ModelGenome:
    experts = [path for name, path in paths.items() if name != "base"]
    definition = {"models": experts, "merge_method": method, "base_model": paths["base"]}
    return ModelGenome(ModelGenomeDefinition.model_validate({**definition, **settings}))


class Evaluator:
    """Merges genomes and scores the merges, as a worker of ``mergekit-evolve`` does.

    The score is the mean log-likelihood of what expert ``a``, which the closed form gives
    the smaller share, would continue random tokens with.
    """

    def __init__(self, paths, directory, method="metagpt", parameters=(), **settings):
        self.genome = genome_of(paths, method, **settings)
        self.parameters = dict(parameters)
        self.out = Path(directory, "merged")
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(3, VOCABULARY, (8, 24), generator=generator)
        self.answers = self.logits(paths["a"]).argmax(-1)

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
        with counted_surveys() as taken:
            scores = [self.score(genotype) for genotype in genotypes]
        return os.getpid(), len(taken), scores


@contextmanager
def counted_surveys():
    taken = []

    def counted(self, *args, **kwargs):
        taken.append(self)
        return survey(self, *args, **kwargs)

    survey = Checkpoints.survey
    with pytest.MonkeyPatch.context() as patch:
        SESSION.surveys.clear()
        patch.setattr(Checkpoints, "survey", counted)
        yield taken


@pytest.fixture
def evaluator(family, tmp_path):
    return partial(Evaluator, family, tmp_path)


@pytest.mark.parametrize("first", ["mergekit.evo.genome", "mergekit_metagpt.method.merge_method"])
def test_the_methods_are_known_whatever_is_imported_first(first):
    """MergeKit's evolution imports genomes before merge methods, in its workers too."""
    program = f"""
import {first}
from mergekit.merge_methods import get
print(get("metagpt").spec.name, get("metagpt_ties").spec.name)
"""
    done = run(sys.executable, "-W", "error::RuntimeWarning", "-c", program)
    assert done.stdout == "metagpt metagpt_ties\n", done.stderr
    assert "mergekit-metagpt needs" not in done.stderr


def test_every_method_may_evolve_and_density_where_there_is_one():
    own = [m.spec.name for m in registered_methods() if m.spec.name.startswith("metagpt")]
    for name in own:
        assert METHOD_PARAM_MAPS[name] == ["weight"] + ["density"] * (name != "metagpt")
    assert METHOD_PARAM_MAPS["ties"] == ["weight", "density"]
    assert METHOD_PARAM_MAPS["slerp"] == ["t"]


@pytest.mark.parametrize("settings", [{}, {"layer_granularity": 1}, {"filters": ["mlp"]}])
@pytest.mark.parametrize("method", ["metagpt", "metagpt_ties"])
def test_evolution_starts_at_the_closed_form(method, settings, family, evaluator, merge):
    """The first genome of mergekit-evolve gives equal weights, which are equal priors."""
    one = evaluator(method, normalize=False, **settings)
    merged = one.merge(one.genome.initial_genotype())
    closed = merge_config(family, method, dtype="bfloat16", parameters={"normalize": False})
    for name, tensor in merge(closed).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(merged[name], tensor)


def test_the_genes_of_metagpt_are_priors(family, evaluator):
    one = evaluator()
    genes = torch.tensor([3.0, 0.5])
    arrays = one.genome.genotype_to_param_arrays(genes)
    assert {name: gene.item() for name, gene in arrays.items()} == {
        "a_weight": 3.0,
        "b_weight": 0.5,
    }
    base, *experts = (
        {name: tensor.bfloat16() for name, tensor in read(path).items()} for path in family.values()
    )
    expected = reference.coefficients(base, experts, "tensor", priors=[3.0, 0.5])
    reference.assert_merged(one.merge(genes), base, experts, expected)


def test_the_genes_of_metagpt_ties_are_priors_and_densities(family, evaluator, merge):
    one = evaluator("metagpt_ties", normalize=True)
    genes = [3.0, 0.4, 0.5, 0.8]
    names = ["a_weight", "a_density", "b_weight", "b_density"]
    arrays = one.genome.genotype_to_param_arrays(torch.tensor(genes))
    assert {name: arrays[name].item() for name in arrays} == pytest.approx(
        dict(zip(names, genes, strict=True))
    )
    config = merge_config(family, "metagpt_ties", dtype="bfloat16", parameters={"int8_mask": True})
    for model, weight, density in zip(config["models"], genes[::2], genes[1::2], strict=True):
        model["parameters"] = {"weight": weight, "density": density}
    merged, expected = one.merge(torch.tensor(genes, dtype=torch.float64)), merge(config)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_a_smooth_genome_lets_priors_run_from_layer_to_layer(family, evaluator):
    one = evaluator(smooth=True, layer_granularity=1)
    assert one.genome.initial_genotype().numel() == 2 * 3
    even = one.merge(torch.ones(6))
    tilted = one.merge(torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0, 1.0]))
    same = {name for name in even if torch.equal(even[name], tilted[name])}
    assert any("layers.0." in name for name in same)
    assert not any("layers.2." in name and "norm" not in name for name in same)


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
def test_a_worker_surveys_once_for_all_of_its_genomes(granularity, evaluator):
    one = evaluator(parameters={"granularity": granularity})
    _, surveys, scores = one.report(torch.tensor([[1.0, 1.0], [4.0, 1.0], [1.0, 4.0]]))
    assert surveys == (granularity != "tensor")
    assert len(set(scores)) == 3


@pytest.mark.parametrize("method", ["metagpt", "metagpt_ties"])
def test_cma_es_ends_no_worse_than_the_closed_form(method, evaluator):
    cma = pytest.importorskip("cma")
    one = evaluator(method, normalize=method == "metagpt_ties")
    start = one.genome.initial_genotype().flatten().numpy()
    closed_form = one.score(start)
    costs = []

    def cost(genotype) -> float:
        costs.append(-one.score(genotype))
        return costs[-1]

    # As mergekit-evolve calls it; the start itself is among the candidates.
    evolution = cma.CMAEvolutionStrategy(
        start, 1 / 6, {"maxfevals": 24, "popsize": 6, "seed": 1, "verbose": -9}
    )
    evolution.inject([start], force=True)
    evolution.optimize(cost)
    best = evolution.result
    assert costs[0] == pytest.approx(-closed_form)
    assert -best.fbest >= closed_form
    # The score rewards the expert that the closed form keeps small, and evolution sees it.
    assert -best.fbest > closed_form + 1e-3
    if method == "metagpt":
        assert abs(best.xbest[0]) > abs(best.xbest[1])


@pytest.mark.xdist_group("ray")
def test_ray_workers_score_as_one_process_does_and_survey_once_each(
    family, evaluator, tmp_path, cluster
):
    import ray

    genotypes = torch.tensor([[1.0, 1.0], [4.0, 1.0], [1.0, 4.0]])
    parameters = {"granularity": "model"}
    expected = evaluator(parameters=parameters).report(genotypes)
    remote = ray.remote(num_cpus=0.5)(Evaluator)
    workers = [
        remote.remote(family, tmp_path / str(number), parameters=parameters) for number in range(2)
    ]
    reports = ray.get([worker.report.remote(genotypes) for worker in workers], timeout=120)
    assert len({process for process, _, _ in (expected, *reports)}) == 3
    for _, surveys, scores in reports:
        assert surveys == 1
        assert scores == pytest.approx(expected[2], abs=1e-6)


def test_the_command_knows_the_methods_wherever_it_can_be_imported(family):
    """MergeKit 0.1.5's command names a module of lm_eval that only vLLM can load."""
    try:
        evolve = importlib.import_module("mergekit.scripts.evolve")
    except (ImportError, AttributeError) as reason:
        pytest.skip(f"mergekit.scripts.evolve cannot be imported here: {reason}")
    config = evolve.EvolMergeConfiguration.model_validate(
        {
            "genome": {
                "models": [family["a"], family["b"]],
                "merge_method": "metagpt_ties",
                "base_model": family["base"],
            },
            "tasks": ["own_task"],
        }
    )
    assert evolve.ModelGenome(config.genome).initial_genotype().numel() == 4
