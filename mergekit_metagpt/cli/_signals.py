"""How commands end when they are stopped."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click


@contextmanager
def stopped_once() -> Iterator[None]:
    """Let SIGINT (Ctrl-C), SIGTERM and SIGHUP end a command in one line.

    After the first signal, further ones are ignored, so that the command can clean up. Signals
    that the parent process ignores stay ignored, such as SIGHUP under ``nohup``.

    Raises:
        ClickException: if a signal came.
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
        raise click.ClickException(f"This command was {str(stopped) or 'stopped'}.") from stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
