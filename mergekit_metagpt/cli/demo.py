"""``mergekit-metagpt demo``: train a small base and experts, merge and score them."""

import os
import shlex
import shutil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import click
from rich.console import Console

if TYPE_CHECKING:
    from mergekit_metagpt.demo.models import Scale

_LEGEND = """\
metagpt-*: merge_method metagpt, by granularity
task-arithmetic: stock task_arithmetic, weight 0.3 each
average: stock linear, the plain average of the experts
One small run: an illustration, not a benchmark
"""

# Imports of torch and MergeKit are inside functions: help and refusals do not wait for them.

_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
path = {path!r}
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
prompt = tokenizer("sort 4 1 3 0 2 5 =", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=7)[0]))"""


@click.command(epilog="Example: mergekit-metagpt demo my-demo")
@click.argument(
    "directory",
    metavar="[DIR]",
    default="metagpt-demo",
    type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
)
def demo(directory: Path) -> None:
    """Train small models, merge them and show the scores.

    Trains a base and three experts, which takes a minute or two on a CPU, and merges them with
    the stock mergekit-yaml command. Writes the models, the merge configs and the merges to DIR,
    which must be new or empty. The default is metagpt-demo.
    """
    is_new = not directory.exists()
    _require_usable(directory)
    # All models are on this disk, so transformers and MergeKit need not ask the hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from mergekit_metagpt.cli._common import console
    from mergekit_metagpt.demo.models import Scale

    # With more threads, the scores would depend on their number, and such small models would
    # train no faster.
    torch.set_num_threads(1)
    try:
        run_demo(directory, Scale(), console())
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if not is_new:
            directory.mkdir(exist_ok=True)
        if isinstance(error, OSError | RuntimeError):
            raise click.ClickException(str(error)) from error
        raise


def run_demo(directory: Path, scale: "Scale", console: Console) -> None:
    """Train, merge and score models in an empty directory, given by its absolute path.

    Raises:
        FileNotFoundError: if there is no ``mergekit-yaml``.
        RuntimeError: if ``mergekit-yaml`` fails.
    """
    from tqdm import tqdm

    from mergekit_metagpt.demo.merges import merge_with_mergekit, stock_command, write_configs
    from mergekit_metagpt.demo.models import TASKS, scores, train_family
    from mergekit_metagpt.measure.checkpoints import Checkpoints
    from mergekit_metagpt.report.tables import survey_tables, table

    command = stock_command()
    train_family(directory, scale)
    files = write_configs(directory)
    merges = {name: directory / "merged" / name for name in files}
    for name in tqdm(files, "Merging with mergekit-yaml", unit="merge"):
        merge_with_mergekit(command, files[name], merges[name])

    rows = {"base": directory / "base"}
    rows |= {f"expert {task}": directory / task for task in TASKS} | merges
    results = [scores(path, scale) for path in tqdm(rows.values(), "Scoring", unit="model")]
    columns = {"model": list(rows)}
    columns |= {task: [f"{own[task]:.1f}" for own in results] for task in TASKS}
    columns["average"] = [f"{fmean(own.values()):.1f}" for own in results]
    show = console.print
    show(f"Right answers to {scale.held_out} held-out prompts per task, in %", style="bold")
    show(table(columns), _LEGEND)
    experts = [str(directory / task) for task in sorted(TASKS)]
    survey = Checkpoints.of(str(rows["base"]), experts).survey(progress=False, products=True)
    show("Scaling coefficients at granularity model", style="bold")
    show(survey_tables(survey))
    shown = "metagpt-direction"
    words = [command, str(files[shown]), str(merges[shown])]
    for text in (
        f"The config of {shown}: {files[shown]}",
        f"It was merged with:\n{shlex.join(words)}",
        f"Use it in Python:\n{_USAGE.format(path=str(merges[shown]))}",
    ):
        console.out(f"\n{text}", highlight=False)


def _require_usable(directory: Path) -> None:
    """Create the directory, or say in one sentence why it cannot be used."""
    if set("+@") & set(str(directory)):
        why = "has a + or @, which MergeKit reads as a LoRA or a revision"
    else:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            why = "is not empty" if any(directory.iterdir()) else ""
        except OSError as error:
            why = f"cannot be used ({error.strerror})"
    if why:
        raise click.ClickException(f"{directory} {why}; choose another directory.")
