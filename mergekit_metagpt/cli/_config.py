"""The merge config that a command works on."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_metagpt.distributed import Mapper

config_argument = click.argument("config", type=click.Path(exists=True, dir_okay=False))
ray_option = click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Work on a Ray cluster, or as one on this machine alone. Give it after the arguments.",
)


def read_config(path: str) -> "MergeConfiguration":
    """Parse a merge config as ``mergekit-yaml`` does.

    Raises:
        click.ClickException: if it is no merge config; says what is wrong where.
    """
    import yaml
    from mergekit.config import MergeConfiguration
    from pydantic import ValidationError

    try:
        return MergeConfiguration.model_validate(yaml.safe_load(Path(path).read_text("utf-8")))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'the document'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise click.ClickException(f"{path} is not a merge config: {problems}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise click.ClickException(f"{path} is not a merge config: {reason}.") from error


def wants_progress(options: "MergeOptions") -> bool:
    """Return whether progress bars are shown: on a terminal, unless ``--quiet`` is given."""
    return sys.stderr.isatty() and not options.quiet


def mapper(ray: str | None, options: "MergeOptions") -> "Mapper":
    """Return who measures, for the value of ``--ray``."""
    from mergekit_metagpt.distributed import RayMapper, in_this_process

    return in_this_process if ray is None else RayMapper(ray or None, options)
