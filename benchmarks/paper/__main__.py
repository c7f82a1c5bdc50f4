"""The command `python -m benchmarks.paper`."""

import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from benchmarks.paper.merges import merge, with_local_models
from benchmarks.paper.report import comparison
from benchmarks.paper.scores import Scores
from benchmarks.paper.tables import Row, Table, read_table, table_numbers

_FOLDER = click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path)
_WIDTH = 100  # of a table in a file or a pipe


@click.command(epilog="Example: python -m benchmarks.paper 1 --limit 20 --only MetaGPT")
@click.argument("number", metavar="TABLE", type=click.Choice(table_numbers()))
@click.option(
    "--out",
    default="paper-tables",
    show_default=True,
    metavar="DIR",
    type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
    help="Where merges and scores go; one run at a time.",
)
@click.option("--only", multiple=True, metavar="ROW", help="Only this row; may be repeated.")
@click.option("--limit", type=click.IntRange(min=1), help="Questions per task; all by default.")
@click.option(
    "--models", type=_FOLDER, metavar="DIR", help="Local checkpoints, as DIR/org/name or DIR/name."
)
@click.option("--tasks", type=_FOLDER, metavar="DIR", help="YAML tasks that replace lm-eval's own.")
@click.option(
    "--confirm-run-unsafe-code",
    "unsafe_code",
    is_flag=True,
    help="Run MBPP and HumanEval, which execute what the model writes.",
)
def main(
    number: int,
    out: Path,
    only: tuple[str, ...],
    limit: int | None,
    models: Path | None,
    tasks: Path | None,
    unsafe_code: bool,
) -> None:
    """Measure a TABLE of the paper, 1 to 5, and print it beside the published figures.

    Every row is merged with the stock mergekit-yaml, from the models that the paper names, and
    scored with lm-eval (pip install 'mergekit-metagpt[benchmarks]') on a GPU if there is one.
    The file benchmarks/paper/tables.yaml says how to merge each row and measure each column.

    Each score is saved at once. After an interruption, the same command continues where it
    stopped. A merge is deleted after its row is scored. The normalized averages of table 4 need
    the experts' scores from table 1.
    """
    table = read_table(number)
    if models:
        table = replace(
            table,
            rows=[with_local_models(row, models) for row in table.rows],
            experts={name: with_local_models(row, models) for name, row in table.experts.items()},
        )
    rows = _chosen(table, only)
    scores = Scores(out, tasks, limit, unsafe_code)
    _require_tasks(table, rows, scores)
    for row in rows:
        _measure(row, table, scores)
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    console.print(comparison(table, rows, scores))


def _chosen(table: Table, names: tuple[str, ...]) -> list[Row]:
    rows = {row.name: row for row in table.rows}
    for name in names:
        if name not in rows:
            raise click.UsageError(
                f"Table {table.number} has no row {name!r}; its rows are {', '.join(rows)}."
            )
    return [rows[name] for name in names or rows]


def _require_tasks(table: Table, rows: list[Row], scores: Scores) -> None:
    """Load the tasks first, so that a missing task is found before any merge."""
    missing = {column.name for row in rows for column in scores.missing(row, table.columns)}
    if missing and importlib.util.find_spec("lm_eval") is None:
        raise click.ClickException(
            "lm-eval is not installed: pip install 'mergekit-metagpt[benchmarks]'."
        )
    for column in table.columns:
        if column.name in missing:
            try:
                scores.load_tasks(column)
            except Exception as error:  # whatever a task's own code raises
                raise click.ClickException(
                    f"lm-eval cannot load {', '.join(column.tasks)} ({column.name}): {error}"
                ) from error


def _measure(row: Row, table: Table, scores: Scores) -> None:
    """Measure the missing scores of a row, and delete its merge."""
    missing = scores.missing(row, table.columns)
    merged = scores.out / row.folder / "merged"
    if missing and not isinstance(row.source, str):
        click.echo(f"{row.name}: merging with mergekit-yaml", err=True)
        merge(row, merged)
    checkpoint = row.source if isinstance(row.source, str) else str(merged)
    for column in missing:
        try:
            score = scores.measure(row, column, checkpoint)
        except (OSError, ValueError) as error:
            raise click.ClickException(
                f"lm-eval could not measure {row.name} on {column.name}: {error}"
            ) from error
        click.echo(f"{row.name}: {column.name} {score:.2f}", err=True)
    shutil.rmtree(merged, ignore_errors=True)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.paper")
