"""``mergekit-metagpt demo``: train a small base and experts, merge and score them."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from statistics import fmean

import click
import huggingface_hub
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from rich.console import Console
from tqdm import tqdm

from mergekit_metagpt.api.functions import survey
from mergekit_metagpt.cli import _shared
from mergekit_metagpt.demo import models
from mergekit_metagpt.report.tables import table

_LEGEND = """\
metagpt-*: merge_method metagpt, by granularity
task-arithmetic: stock task_arithmetic, weight 0.3 each
average: stock linear, the plain average of the experts
One small run: an illustration, not a benchmark
"""
_SHOWN = "metagpt-direction"


@click.command(epilog="Example: mergekit-metagpt demo my-demo")
@click.argument(
    "directory",
    metavar="[DIR]",
    default="metagpt-demo",
    type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
)
def demo(directory: Path) -> None:
    """Train small models, merge them and show the scores.

    Trains a base and three experts, which takes a minute or two on a CPU, and merges them; the
    last merge is a run of the stock mergekit-yaml command. Writes the models, the merge configs and
    the merges to DIR, which must be new or empty. The default is metagpt-demo.
    """
    is_new = not directory.exists()
    _require_usable(directory)
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # all models are on this disk
    # With more threads, the scores would depend on their number, and such small models would
    # train no faster.
    torch.set_num_threads(1)
    try:
        run_demo(directory, models.Scale(), _shared.console())
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if not is_new:
            directory.mkdir(exist_ok=True)
        if isinstance(error, OSError | RuntimeError):
            raise click.ClickException(str(error)) from error
        raise


def run_demo(directory: Path, scale: models.Scale, console: Console) -> None:
    """Train, merge and score models in an empty directory, given by its absolute path.

    Raises:
        OSError, RuntimeError: if there is no ``mergekit-yaml``, or it fails.
    """
    scripts, tasks, options = sysconfig.get_path("scripts"), models.TASKS, MergeOptions(quiet=True)
    if not (command := shutil.which("mergekit-yaml", path=scripts)):
        raise FileNotFoundError(
            f"There is no mergekit-yaml in {scripts}; install MergeKit for this interpreter."
        )
    models.train_family(directory, scale)
    rows = {"base": directory / "base", **{f"expert {task}": directory / task for task in tasks}}
    for name, config in tqdm(models.merge_configs(directory).items(), "Merging", unit="merge"):
        content = yaml.safe_dump(config, sort_keys=False)
        (directory / f"{name}.yml").write_text(content, encoding="utf-8")
        rows[name] = directory / "merged" / name
        if name != _SHOWN:
            parsed = MergeConfiguration.model_validate(config)
            run_merge(parsed, str(rows[name]), options, config_source=content)
    words = [command, str(directory / f"{_SHOWN}.yml"), str(rows[_SHOWN])]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=offline, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)} failed:\n{done.stderr}")

    results = [models.scores(path, scale) for path in tqdm(rows.values(), "Scoring", unit="model")]
    columns = {"model": list(rows)}
    columns |= {task: [f"{own[task]:.1f}" for own in results] for task in tasks}
    columns["average"] = [f"{fmean(own.values()):.1f}" for own in results]
    console.print(
        f"Right answers to {scale.held_out} held-out prompts per task, in %", style="bold"
    )
    console.print(table(columns), _LEGEND)
    found = survey(str(rows["base"]), [str(directory / task) for task in tasks], options=options)
    console.print("Scaling coefficients at granularity model", style="bold")
    console.print(found.shown()[-1])
    console.out(f"\n{_SHOWN} was merged with:\n{shlex.join(words)}", highlight=False)


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
