"""What models are judged by: the figures of tasks, the paper's averages, and exact identity."""

import hashlib
import math
import os

import pytest

from mergekit_metagpt.evaluation.averages import Column, averages
from mergekit_metagpt.evaluation.results import Results
from mergekit_metagpt.measure.identity import sha256_of
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


def columns(**models: Results) -> list[Column]:
    """Return the scores of models; those named a and b are the experts."""
    tasks = next(iter(models.values())).results
    return [Column.of(task, models, ["a", "b"]) for task in tasks]


def test_the_averages_compare_a_merge_with_the_expert_of_each_task():
    scored = columns(
        base=results(sums={"acc,none": 0.1, "perplexity,none": math.e**5}, law={"acc,none": 0.3}),
        a=results(sums={"acc,none": 0.8, "perplexity,none": math.e}, law={"acc,none": 0.2}),
        b=results(sums={"acc,none": 0.4, "perplexity,none": math.e**2}, law={"acc,none": 0.5}),
        merge=results(sums={"acc,none": 0.6, "perplexity,none": math.e**3}, law={"acc,none": 0.4}),
    )
    assert [column.expert for column in scored] == ["a", "b"]
    assert averages(scored, "merge") == pytest.approx(
        {
            "absolute_average": 0.5,
            "normalized_average": (0.6 / 0.8 + 0.4 / 0.5) / 2,
            "average_loss_difference": 3 - 1,  # of the one task that measures a loss
        }
    )
    assert averages(scored, "a")["normalized_average"] == pytest.approx((1 + 0.2 / 0.5) / 2)
    assert averages(scored, "a")["average_loss_difference"] == 0


def test_a_task_that_measures_perplexity_only_counts_in_no_other_average():
    text = {"word_perplexity,none": math.e**2, "byte_perplexity,none": 1.5}
    worse = {"word_perplexity,none": math.e**4, "byte_perplexity,none": 1.6}
    (column,) = columns(a=results(text=worse), b=results(text=text))
    assert (column.metric, column.expert) == ("word_perplexity,none", "b")
    assert averages([column], "a") == {
        "absolute_average": None,
        "normalized_average": None,
        "average_loss_difference": pytest.approx(2),
    }


def test_experts_that_score_the_same_are_told_apart_by_their_loss():
    (column,) = columns(
        a=results(sums={"acc,none": 0.0, "perplexity,none": 9.0}),
        b=results(sums={"acc,none": 0.0, "perplexity,none": 8.0}),
    )
    assert column.expert == "b"
    assert averages([column], "b")["normalized_average"] is None  # nothing to be related to


def test_a_task_is_judged_by_its_first_metric_of_which_higher_is_better():
    qa = results(qa={"perplexity,none": 2.0, "f1,none": 0.5, "acc,none": 0.25}, mmlu={})
    assert qa.metric("qa") == ("f1,none", True)
    assert qa.loss("qa") == pytest.approx(math.log(2))
    with pytest.raises(BadInputError, match="no figure for mmlu"):
        qa.metric("mmlu")


def test_every_byte_of_a_file_counts(tmp_path):
    file = tmp_path / "model.safetensors"
    content = bytearray(9 << 20)
    known = set()
    for at in range(0, len(content), 2_999_983):
        content[at] = 1
        file.write_bytes(content)
        os.utime(file, ns=(0, at))
        known.add(sha256_of(file))
        assert sha256_of(file) == hashlib.sha256(content).hexdigest()
    assert len(known) == 4
