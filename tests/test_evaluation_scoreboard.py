"""The paper's averages over the tasks that a merge is scored on."""

import math

import pytest

from mergekit_metagpt.evaluation.results import Results
from mergekit_metagpt.evaluation.scoreboard import Column, Scoreboard
from mergekit_metagpt.wording import BadInputError


def results(**tasks: dict[str, float]) -> Results:
    """Return the results of a model; of every metric but perplexities higher is better."""
    return Results(
        results={task: {"alias": task, **figures} for task, figures in tasks.items()},
        higher_is_better={
            task: {key.partition(",")[0]: "perplexity" not in key for key in figures}
            for task, figures in tasks.items()
        },
    )


def board(**models: Results) -> Scoreboard:
    """Return the scores of models; those named a and b are the experts."""
    tasks = next(iter(models.values())).results
    return Scoreboard([Column.of(task, models, ["a", "b"]) for task in tasks])


FOUND = board(
    base=results(sums={"acc,none": 0.1, "perplexity,none": math.e**5}, law={"acc,none": 0.3}),
    a=results(sums={"acc,none": 0.8, "perplexity,none": math.e}, law={"acc,none": 0.2}),
    b=results(sums={"acc,none": 0.4, "perplexity,none": math.e**2}, law={"acc,none": 0.5}),
    merge=results(sums={"acc,none": 0.6, "perplexity,none": math.e**3}, law={"acc,none": 0.4}),
)


def test_the_expert_of_a_task_is_the_one_that_does_best_on_it():
    assert [column.expert for column in FOUND.columns] == ["a", "b"]


def test_the_averages_compare_a_merge_with_the_expert_of_each_task():
    assert FOUND.absolute_average("merge") == pytest.approx(0.5)
    assert FOUND.normalized_average("merge") == pytest.approx((0.6 / 0.8 + 0.4 / 0.5) / 2)
    assert FOUND.normalized_average("a") == pytest.approx((1 + 0.2 / 0.5) / 2)


def test_the_loss_difference_is_over_the_tasks_that_measure_a_loss():
    assert FOUND.loss_difference("merge") == pytest.approx(3 - 1)
    assert FOUND.loss_difference("a") == 0


def test_a_task_that_measures_perplexity_only_counts_in_no_other_average():
    text = {"word_perplexity,none": math.e**2, "byte_perplexity,none": 1.5}
    worse = {"word_perplexity,none": math.e**4, "byte_perplexity,none": 1.6}
    found = board(a=results(text=worse), b=results(text=text))
    assert found.columns[0].metric == "word_perplexity,none"
    assert found.columns[0].expert == "b"
    assert found.loss_difference("a") == pytest.approx(2)
    assert math.isnan(found.absolute_average("a"))
    assert math.isnan(found.normalized_average("a"))


def test_experts_that_score_the_same_are_told_apart_by_their_loss():
    found = board(
        a=results(sums={"acc,none": 0.0, "perplexity,none": 9.0}),
        b=results(sums={"acc,none": 0.0, "perplexity,none": 8.0}),
    )
    assert found.columns[0].expert == "b"
    assert math.isnan(found.normalized_average("b"))


def test_a_task_is_judged_by_its_first_metric_of_which_higher_is_better():
    found = results(qa={"perplexity,none": 2.0, "f1,none": 0.5, "acc,none": 0.25})
    assert found.metric("qa") == ("f1,none", True)
    assert found.loss("qa") == pytest.approx(math.log(2))


def test_a_group_without_figures_is_named():
    with pytest.raises(BadInputError, match="no figure for mmlu"):
        results(mmlu={}).metric("mmlu")
