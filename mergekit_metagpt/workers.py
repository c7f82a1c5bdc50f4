"""Where the work runs: in this process, or on the machines of a Ray cluster.

A :data:`Mapper` measures tensors, each on its own, and returns a few numbers of each in their
order. Their sums are exactly rounded, so the result is the same, bit for bit, for any number of
workers, even if some of them die. The files of a merge are mapped in the same way.
"""

import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

# Applies a function to items; yields the results in the order of the items.
Mapper = Callable[..., Generator[Any, None, None]]

# Tensors per task: enough to pay for its scheduling, few enough to keep many machines busy.
_RUN = 4
# How often Ray repeats a task whose worker or machine dies. It never repeats one that raises.
_RETRIES = 10
_PATIENCE = 10  # seconds


def in_this_process(
    function: Callable[[Any], Any], items: Sequence[Any], **_: Any
) -> Generator[Any, None, None]:
    """Apply the function to the items one by one, each only when its result is needed.

    The settings of a cluster make no difference.
    """
    for item in items:
        yield function(item)


class RayMapper:
    """A :data:`Mapper` that applies functions on a Ray cluster.

    Every machine of the cluster needs this package and the models, at the same paths or from
    the hub. The function and the items are pickled.
    """

    def __init__(self, address: str | None, set_up: Callable[[], None], gpus: float = 0) -> None:
        """Connect to a cluster that this machine is part of, unless this process is connected.

        If neither an address nor ``RAY_ADDRESS`` is given, a cluster of this machine alone is
        started, which ends with this process. Each worker calls ``set_up``, which is pickled,
        before its first task of a call. A task needs ``gpus``.

        Raises:
            ImportError: if Ray is not installed.
            ConnectionError: if no cluster answers at the address.
        """
        try:
            import ray
        except ImportError as error:
            raise ImportError(
                "Distributed work needs Ray; run: pip install 'mergekit-metagpt[ray]'"
            ) from error
        self._ray, self._set_up, self._gpus = ray, set_up, gpus
        if ray.is_initialized():
            return
        # Without an address, Ray would wait for a cluster that has died on this machine.
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        # A merge sends no usage statistics.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # The first exception is raised here; those of other tasks are only consequences of it.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        try:
            _require_listener(address)
            former = signal.getsignal(signal.SIGTERM)
            # log_to_driver would mix what workers print with what the command prints.
            ray.init(
                address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, former or signal.SIG_DFL)  # not Ray's
        except (OSError, RuntimeError, ValueError) as error:
            raise ConnectionError(
                f"No Ray cluster could be reached at {address}: {error}"
            ) from error

    def __call__(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        run: int = _RUN,
        cpus: float = 1,
        stop: Path | None = None,
    ) -> Generator[Any, None, None]:
        """Yield ``function(item)`` for each item, as the cluster returns it.

        A task takes a ``run`` of items. The first exception that one raises is raised here; then
        the other tasks run on until this process ends, because cancelling a task that is just
        ending can crash Ray. They are waited for if there is a file to make that ends them.
        """
        ray = self._ray
        # A task that needs more CPUs than the largest machine has would wait for ever.
        sizes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        task = ray.remote(
            max_retries=_RETRIES, num_cpus=min(cpus, max(1, *sizes)), num_gpus=self._gpus
        )(_apply)
        shared = ray.put((uuid.uuid4().hex, self._set_up, os.getcwd(), function))
        runs = [items[start : start + run] for start in range(0, len(items), run)]
        tasks = [task.remote(shared, each) for each in runs]
        try:
            for each in tasks:
                yield from ray.get(each)
        except BaseException as error:
            if stop:
                stop.touch()
                ray.wait(tasks, num_returns=len(tasks), fetch_local=False)
            if isinstance(error, ray.exceptions.RayTaskError):
                # The function's own exception, as without Ray, not the worker's traceback.
                raise error.cause from error
            raise


def _apply(shared: tuple[str, Callable[[], None], str, Callable[[Any], Any]], items: Any) -> Any:
    """Run in a worker: set it up if this is its first task of the call, and apply the function."""
    global _last_call
    call, set_up, directory, function = shared
    if call != _last_call:
        if os.path.isdir(directory):
            os.chdir(directory)  # relative paths in a config start there
        set_up()
        _last_call = call
    return [function(item) for item in items]


_last_call = ""  # the call that this worker is set up for


def _require_listener(address: str) -> None:
    """Raise OSError if nothing listens at ``[ray://]HOST:PORT``; Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
