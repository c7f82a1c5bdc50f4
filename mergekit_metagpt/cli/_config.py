"""The arguments that commands share: the merge config, and where the work runs."""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_metagpt.measure.hub import HubModel
    from mergekit_metagpt.planning.forecast import Forecast
    from mergekit_metagpt.workers import RayMapper

Command = TypeVar("Command", bound=Callable[..., Any])

config_argument = click.argument(
    "config", type=click.Path(exists=True, dir_okay=False, allow_dash=True)
)
ray_option = click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Run on the Ray cluster at ADDRESS or $RAY_ADDRESS, or else on a new one on this machine. "
    "Put this option after the arguments.",
)

keep_option = click.option(
    "--keep",
    is_flag=True,
    help="Download models of the hub to its cache, for a merge that follows. Without this, their "
    "tensors are read from the hub one by one and not stored.",
)


def survey_options(command: "Command") -> "Command":
    """Let a command take the survey of its models from a file, and write it to one."""
    command = click.option(
        "--save-survey",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="Write what was measured to this file, for --survey.",
    )(command)
    return click.option(
        "--survey",
        type=click.Path(exists=True, dir_okay=False),
        metavar="FILE",
        help="Take norms and inner products from this file instead of measuring the models.",
    )(command)


def wants_progress(options: "MergeOptions") -> bool:
    """Return whether progress bars are shown: on a terminal, unless ``--quiet`` is given."""
    return sys.stderr.isatty() and not options.quiet


def warn(sentences: Iterable[str]) -> None:
    """Print warnings to standard error."""
    for sentence in sentences:
        click.secho(f"Warning: {sentence}", fg="yellow", err=True)


def ray_mapper(ray: str, options: "MergeOptions", on_hub: "Sequence[HubModel]" = ()) -> "RayMapper":
    """Return the cluster that the value of ``--ray`` names; connect to it or start it.

    Its workers read the models ``on_hub`` from there.
    """
    import torch

    from mergekit_metagpt.measure.checkpoints import set_up_worker
    from mergekit_metagpt.workers import RayMapper

    on_cuda = torch.device(options.device or "cpu").type == "cuda"
    return RayMapper(ray or None, partial(set_up_worker, options, on_hub), gpus=int(on_cuda))


def forecast_config(
    config: str,
    options: "MergeOptions",
    ray: str | None,
    survey: str | None,
    save_survey: str | None,
    granularity: str | None = None,
    numbers_only: bool = False,
    keep: bool = False,
) -> "Forecast":
    """Return the coefficients that the merge of a config will use, measured here or on Ray.

    Args:
        config: the path of the config, or ``-``.
        options: MergeKit's options.
        ray: the value of ``--ray``.
        survey: the value of ``--survey``.
        save_survey: the value of ``--save-survey``.
        granularity: if given, replaces the config's.
        numbers_only: refuse matrices of coefficients.
        keep: whether models of the hub are downloaded to its cache.
    """
    from mergekit_metagpt.api.running import forecast_of
    from mergekit_metagpt.cli._output import write_text
    from mergekit_metagpt.planning.config import read_config

    options.apply_global_options()  # type: ignore[no-untyped-call]
    return forecast_of(
        read_config(config),
        options,
        survey=survey,
        granularity=granularity,
        numbers_only=numbers_only,
        keep=keep,
        progress=wants_progress(options),
        mapper=None if ray is None else partial(ray_mapper, ray),
        warn=warn,
        save=None if save_survey is None else partial(write_text, save_survey),
    )
