"""Who works: this process, or the machines of a Ray cluster.

To know what a survey counts takes all tensors, to measure one takes nothing but that one. So
the measuring goes through a :data:`Mapper`, and only its few numbers come back. They do so in
the order of the tensors, and sums of them are exactly rounded: neither how many workers there
are, nor which of them dies, changes a bit.
"""

import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Protocol, TypeVar

import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

# Tensors to a task: enough to pay for its scheduling, few enough to keep many machines busy.
_RUN = 4
# For workers that die, with their machine or alone; an exception is final the first time.
_RETRIES = 10
_PATIENCE = 10  # seconds


class Mapper(Protocol):
    """Applies a function to items; yields the results in the order of the items."""

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item], progress: bool
    ) -> Iterator[Result]:
        """Yield ``function(item)`` for each item; ``progress`` shows a bar meanwhile."""
        ...


def in_this_process(
    function: Callable[[Item], Result], items: Sequence[Item], progress: bool
) -> Iterator[Result]:
    """Apply the function to one item after the other, each when its result is asked for."""
    with _measuring(len(items), progress) as bar:
        for item in items:
            yield function(item)
            bar.update()


class RayMapper:
    """Applies functions on a Ray cluster; as a :data:`Mapper`, to short runs of items.

    The machines of the cluster need this package, and the models: by the same paths, or from
    the hub. The function and the items are pickled. After an exception, tasks that have been
    handed out run on until the process ends: to cancel one that just ends can crash Ray.
    """

    def __init__(
        self,
        address: str | None,
        set_up: Callable[[], None],
        *,
        cpus: float = 1,
        gpus: float = 0,
    ) -> None:
        """Connect to a cluster, unless this process is connected to one.

        Args:
            address: of the cluster, of which this machine is to be a part; ``auto`` for
                whichever that is. Without one, and without one in ``RAY_ADDRESS``, a cluster
                of this machine alone is started, which ends with this process.
            set_up: what a worker does before its first task of a call; it is pickled.
            cpus: how many CPUs a task takes up.
            gpus: how many GPUs a task takes up.

        Raises:
            ImportError: if Ray is not installed.
            ConnectionError: if no cluster answers at the address.
        """
        ray = _ray()
        self._set_up = set_up
        self._resources = {"num_cpus": cpus, "num_gpus": gpus}
        if ray.is_initialized():
            return
        # Left to itself, Ray would wait for a cluster that has died on this machine.
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        # A merge tells nobody about itself.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # The first exception is raised here, and those of other tasks follow from it.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        try:
            _require_listener(address)
            with _exiting_on_sigterm():
                # What workers print would be in the midst of what a command prints.
                ray.init(
                    address, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise ConnectionError(
                f"No Ray cluster could be reached at {address}: {error}"
            ) from error

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item], progress: bool
    ) -> Iterator[Result]:
        """Yield ``function(item)`` for each item, as it has come from the cluster."""
        runs = [items[start : start + _RUN] for start in range(0, len(items), _RUN)]
        with _measuring(len(items), progress) as bar:
            for measured in self.results(self.submit(partial(_each, function), runs)):
                yield from measured
                bar.update(len(measured))

    def submit(
        self, function: Callable[[Item], Result], items: Sequence[Item], cpus: float | None = None
    ) -> list[Any]:
        """Hand out a task for each item; return what :meth:`results` takes.

        ``cpus`` is how many CPUs one takes up, if others than usual; at most those of the
        largest machine, where it would otherwise wait for ever.
        """
        ray = _ray()
        resources = dict(self._resources)
        if cpus is not None:
            largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
            resources["num_cpus"] = min(cpus, largest)
        task = ray.remote(max_retries=_RETRIES, **resources)(_apply)
        shared = ray.put((uuid.uuid4().hex, self._set_up, os.getcwd(), function))
        return [task.remote(shared, item) for item in items]

    def results(self, tasks: Sequence[Any]) -> Iterator[Any]:
        """Yield what the tasks return, in their order, or raise the first exception of one."""
        ray = _ray()
        try:
            for task in tasks:
                yield ray.get(task)
        except ray.exceptions.RayTaskError as error:
            # The function's own exception, as it would be here, not the worker's traceback.
            raise error.cause from error

    def wait(self, tasks: Sequence[Any]) -> None:
        """Return when all tasks have ended, whatever their results."""
        _ray().wait(tasks, num_returns=len(tasks), fetch_local=False)


def _each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def _apply(
    shared: tuple[str, Callable[[], None], str, Callable[[Item], Result]], item: Item
) -> Result:
    """Run in a worker: set it up, unless a task of the same call has done so, and apply."""
    call, set_up, directory, function = shared
    _set_up_once(call, set_up, directory)
    return function(item)


@lru_cache(maxsize=1)
def _set_up_once(call: str, set_up: Callable[[], None], directory: str) -> None:
    """Set this worker up for a call, which ``call`` tells from the others."""
    if os.path.isdir(directory):
        os.chdir(directory)  # where a config's relative paths start
    set_up()


@contextmanager
def _exiting_on_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM, or exit on it in order: the one that Ray sets up aborts."""
    former = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        kept = former not in (signal.SIG_DFL, None)
        signal.signal(signal.SIGTERM, former if kept else _exit)


def _exit(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _require_listener(address: str) -> None:
    """Raise OSError if nobody listens at ``[ray://]HOST:PORT``; Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()


def _measuring(total: int, progress: bool) -> "tqdm.tqdm[Any]":
    return tqdm.tqdm(
        total=total, desc="Measuring task vectors", unit="tensor", disable=not progress
    )


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "Distributed work needs Ray; run: pip install 'mergekit-metagpt[ray]'"
        ) from error
    return ray
