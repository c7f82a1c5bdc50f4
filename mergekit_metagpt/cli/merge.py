"""``mergekit-metagpt merge``: check, merge, record; the output appears whole or not at all."""

import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from mergekit_metagpt.cli._config import (
    config_argument,
    ray_mapper,
    ray_option,
    wants_progress,
    warn,
)
from mergekit_metagpt.cli._options import MergeCommand
from mergekit_metagpt.cli._output import console
from mergekit_metagpt.cli.check import require_sound

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_metagpt.merging.whole import Merger


@click.command(cls=MergeCommand)
@config_argument
@click.argument("out", type=click.Path(path_type=Path))
@ray_option
@click.pass_context
def merge(
    context: click.Context,
    config: str,
    out: Path,
    ray: str | None,
    merge_options: "MergeOptions",
) -> None:
    """Merge CONFIG into the new directory OUT, as mergekit-yaml does, but safely.

    Checks everything it can before it starts. OUT appears only when the merge is complete,
    with the coefficients in its model card and a record in metagpt.json.

    \b
    Example:
      mergekit-metagpt merge metagpt.yml merged/ --random-seed 0
    """
    from mergekit_metagpt.merging.whole import merge_here, merge_whole
    from mergekit_metagpt.method.advice import warnings
    from mergekit_metagpt.method.session import SESSION
    from mergekit_metagpt.method.summary import Summary
    from mergekit_metagpt.planning.config import read_config
    from mergekit_metagpt.planning.fingerprints import with_fresh_lora_cache
    from mergekit_metagpt.report.tables import coefficients_table

    if merge_options.random_seed is None:
        seed = secrets.randbits(32)  # numpy takes no larger seeds
        merge_options = merge_options.model_copy(update={"random_seed": seed})
    merge_options.apply_global_options()  # type: ignore[no-untyped-call]
    written = read_config(config)
    found = require_sound(written, str(out), merge_options)
    quiet = merge_options.quiet
    parsed = written.parse()
    merge_options = with_fresh_lora_cache(merge_options, parsed)
    merge_options = merge_options.model_copy(update={"quiet": not wants_progress(merge_options)})
    context.params["merge_options"] = merge_options  # where a survey looks for quiet
    merger: Merger = merge_here
    if ray is not None:
        from mergekit_metagpt.merging.cluster import merge_on_cluster

        mapper = ray_mapper(ray, merge_options)
        merger = partial(merge_on_cluster, mapper=mapper, outputs=found.outputs)
    with _stopped_once(), SESSION.journal() as entries:
        merge_whole(parsed, written.text, out, merge_options, merger)
    summary = Summary(entries)
    warn(warnings(summary))
    if not quiet:
        if entries:
            console().print(coefficients_table(summary))
        click.echo(f"The merge is in {out}.")


@contextmanager
def _stopped_once() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a merge as Ctrl-C does.

    After the first signal, further ones are ignored, so that the merge can clean up. Signals
    that the parent process ignores stay ignored, such as SIGHUP under ``nohup``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets signal handlers only in the main thread
        return
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {number: signal.getsignal(number) for number in numbers if number is not None}
    before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise click.ClickException(f"Merging was {str(stopped) or 'stopped'}.") from stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
