"""What models are judged by: the figures of tasks, the paper's averages, and exact identity."""

import hashlib
import math
import os
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.paper.tables import read_table, table_numbers
from mergekit_metagpt.evaluation.scores import Score, averages, normalized_average
from mergekit_metagpt.measure.identity import sha256_of
from mergekit_metagpt.wording import BadInputError


def scored(**figures: float) -> Score:
    """Return the score on a task; of every metric but perplexities higher is better."""
    report = {
        "results": {"task": {"alias": "task"} | {f"{it},none": v for it, v in figures.items()}},
        "higher_is_better": {"task": {name: "perplexity" not in name for name in figures}},
    }
    return Score.of("task", report, Path("results_1.json"))


def test_the_averages_compare_a_merge_with_the_expert_of_each_task():
    math_expert, law_expert = scored(acc=0.8, perplexity=math.e), scored(acc=0.5)
    merge = scored(acc=0.6, perplexity=math.e**3), scored(acc=0.4)
    own = math_expert, scored(acc=0.2)
    pairs = [list(zip(each, (math_expert, law_expert), strict=True)) for each in (merge, own)]
    assert averages(pairs[0]) == pytest.approx(
        {
            "absolute_average": 0.5,
            "normalized_average": (0.6 / 0.8 + 0.4 / 0.5) / 2,
            "average_loss_difference": 3 - 1,  # of the one task that measures a loss
        }
    )
    assert averages(pairs[1])["normalized_average"] == pytest.approx((1 + 0.2 / 0.5) / 2)
    assert averages(pairs[1])["average_loss_difference"] == 0


def test_a_task_that_measures_perplexity_only_counts_in_no_other_average():
    better = scored(word_perplexity=math.e**2, byte_perplexity=1.5)
    worse = scored(word_perplexity=math.e**4, byte_perplexity=1.6)
    assert better.metric == "word_perplexity,none"
    assert better.rank > worse.rank
    assert list(averages([(worse, better)]).values()) == [None, None, pytest.approx(2)]


def test_a_task_is_judged_by_its_first_metric_of_which_higher_is_better_and_then_by_its_loss():
    score = scored(perplexity=2.0, acc_stderr=0.1, f1=0.5, acc=0.25)
    assert (score.metric, score.higher_is_better, score.value) == ("f1,none", True, 0.5)
    assert score.loss == pytest.approx(math.log(2))
    equal = scored(acc=0.0, perplexity=8.0)
    assert equal.rank > scored(acc=0.0, perplexity=9.0).rank
    assert averages([(equal, equal)])["normalized_average"] is None  # of nothing
    with pytest.raises(BadInputError, match="no figure for task; name its subtasks"):
        scored()


def test_every_byte_of_a_file_counts(tmp_path):
    file, content = tmp_path / "model.safetensors", bytearray(9 << 20)
    for at in range(0, len(content), 2_999_983):
        content[at] = 1
        file.write_bytes(content)
        os.utime(file, ns=(0, at))
        assert sha256_of(file) == hashlib.sha256(content).hexdigest()


# Half a unit of the last digit that the paper prints: table 2 has three of them, the others two.
NORMALIZED_DIGITS = {2: 0.0005}
# Cut off behind the second digit, not rounded as all others: these are the averages.
CUT_OFF = {(1, "LM"): 0.9158, (1, "Math"): 0.8463, (1, "Code"): 0.8458}


@pytest.mark.parametrize("number", table_numbers())
def test_the_averages_of_every_row_of_the_paper_are_the_printed_ones(number):
    table = read_table(number)
    assert len(table.rows) == (4 if number == 4 else 8)
    for row in table.rows:
        average, *printed = row.averages
        assert fmean(row.scores) == pytest.approx(average, rel=0, abs=0.005 + 1e-9)
        if number == 5:  # which has no others
            assert not printed
            continue
        at_home = [table.experts[it.expert].scores[n] for n, it in enumerate(table.columns)]
        found = normalized_average(row.scores, at_home)
        if cut := CUT_OFF.get((number, row.name)):
            assert found == pytest.approx(cut, abs=5e-5)
            assert [math.floor(100 * found) / 100] == printed
        else:
            digits = NORMALIZED_DIGITS.get(number, 0.005)
            assert found == pytest.approx(printed[0], rel=0, abs=digits + 1e-9)
