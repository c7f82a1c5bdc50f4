"""The two averages, on every row that the paper prints."""

import math

import pytest

from benchmarks.paper.tables import Row, Table, read_table, table_numbers
from mergekit_metagpt.evaluation.scores import absolute_average, normalized_average

TABLES = [read_table(number) for number in table_numbers()]
ROWS = [
    pytest.param(table, row, id=f"{table.number}: {row.name}")
    for table in TABLES
    for row in table.rows
]

# Half a unit of the last digit that is printed: table 2 has three of them, the others two.
NORMALIZED_DIGITS = {2: 0.0005}

# Cut off behind the second digit, not rounded as all others: these are the averages.
CUT_OFF = {(1, "LM"): 0.9158, (1, "Math"): 0.8463, (1, "Code"): 0.8458}


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_the_averages_of_a_row_are_the_printed_ones(table: Table, row: Row) -> None:
    average, *normalized = row.averages
    assert absolute_average(row.scores) == pytest.approx(average, rel=0, abs=0.005 + 1e-9)
    for printed in normalized:
        experts = [table.experts[column.expert] for column in table.columns]
        at_home = [expert.scores[number] for number, expert in enumerate(experts)]
        average = normalized_average(row.scores, at_home)
        if (table.number, row.name) in CUT_OFF:
            assert average == pytest.approx(CUT_OFF[table.number, row.name], abs=5e-5)
            assert math.floor(100 * average) / 100 == printed
        else:
            digits = NORMALIZED_DIGITS.get(table.number, 0.005)
            assert average == pytest.approx(printed, rel=0, abs=digits + 1e-9)


def test_the_paper_prints_both_averages_but_in_table_5() -> None:
    printed = [(len(table.rows), {len(row.averages) for row in table.rows}) for table in TABLES]
    assert printed == [(8, {2}), (8, {2}), (8, {2}), (4, {2}), (8, {1})]


def test_averages_of_other_figures() -> None:
    assert normalized_average([62.67, 47.16], [62.67, 47.16]) == 1
    assert math.isnan(normalized_average([50.0, 1.0], [40.0, 0.0]))
    with pytest.raises(ValueError, match="shorter"):
        normalized_average([50.0, 1.0], [40.0])
