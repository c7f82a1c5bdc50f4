"""The arguments that commands share: the merge config, and where the work runs."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_metagpt.planning.config import ConfigFile
    from mergekit_metagpt.planning.forecast import Forecast
    from mergekit_metagpt.workers import RayMapper

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


def wants_progress(options: "MergeOptions") -> bool:
    """Return whether progress bars are shown: on a terminal, unless ``--quiet`` is given."""
    return sys.stderr.isatty() and not options.quiet


def warn(sentences: Iterable[str]) -> None:
    """Print warnings to standard error."""
    for sentence in sentences:
        click.secho(f"Warning: {sentence}", fg="yellow", err=True)


def ray_mapper(ray: str, options: "MergeOptions") -> "RayMapper":
    """Return the cluster that the value of ``--ray`` names; connect to it or start it."""
    from functools import partial

    import torch

    from mergekit_metagpt.measure.checkpoints import set_up_worker
    from mergekit_metagpt.workers import RayMapper

    on_cuda = torch.device(options.device or "cpu").type == "cuda"
    return RayMapper(ray or None, partial(set_up_worker, options), gpus=int(on_cuda))


@contextmanager
def explained(config: "ConfigFile", options: "MergeOptions") -> Iterator[None]:
    """Warn of what MergeKit ignores in a config; explain a failure by the problems of ``check``."""
    from mergekit_metagpt.preflight import ignored, inspect
    from mergekit_metagpt.wording import BadInputError

    known = ignored(config)
    warn(known)
    try:
        yield
    except BadInputError:
        raise
    except Exception as error:
        problems = inspect(config, options=options).problems
        if set(problems) - set(known):
            raise BadInputError(*problems) from error
        raise


def forecast_config(
    config: str,
    options: "MergeOptions",
    ray: str | None,
    granularity: str | None = None,
    numbers_only: bool = False,
) -> "Forecast":
    """Return the coefficients that the merge of a config will use, measured here or on Ray.

    Args:
        config: the path of the config, or ``-``.
        options: MergeKit's options.
        ray: the value of ``--ray``.
        granularity: if given, replaces the config's.
        numbers_only: refuse matrices of coefficients.
    """
    from mergekit_metagpt.planning.config import read_config
    from mergekit_metagpt.planning.fingerprints import with_fresh_lora_cache
    from mergekit_metagpt.planning.forecast import forecast
    from mergekit_metagpt.workers import in_this_process

    options.apply_global_options()  # type: ignore[no-untyped-call]
    written = read_config(config)
    parsed = written.parse()
    with explained(written, options):
        fresh = with_fresh_lora_cache(options, parsed)
        return forecast(
            parsed,
            fresh,
            granularity=granularity,
            numbers_only=numbers_only,
            progress=wants_progress(fresh),
            mapper=in_this_process if ray is None else ray_mapper(ray, fresh),
        )
