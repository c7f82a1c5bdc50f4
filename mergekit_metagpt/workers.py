"""Where the work runs: in this process, or on the machines of a Ray cluster.

To decide which tensors a survey counts, all of them must be known. To measure a tensor, only
that tensor is needed. Measuring therefore goes through a :class:`Mapper`, which returns only a
few numbers per tensor. They arrive in the order of the tensors, and their sums are exactly
rounded. The result is therefore the same, bit for bit, for any number of workers, even if
some of them die.
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

# Tensors per task: enough to pay for its scheduling, few enough to keep many machines busy.
_RUN = 4
# How often Ray repeats a task whose worker or machine dies. It never repeats one that raises.
_RETRIES = 10
_PATIENCE = 10  # seconds


class Mapper(Protocol):
    """Applies a function to items; yields the results in the order of the items."""

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item], progress: bool
    ) -> Iterator[Result]:
        """Yield ``function(item)`` for each item; with ``progress``, show a progress bar."""
        ...


def in_this_process(
    function: Callable[[Item], Result], items: Sequence[Item], progress: bool
) -> Iterator[Result]:
    """Apply the function to the items one by one, each only when its result is needed."""
    with _measuring(len(items), progress) as bar:
        for item in items:
            yield function(item)
            bar.update()


class RayMapper:
    """Applies functions on a Ray cluster; as a :class:`Mapper`, to short runs of items.

    Every machine of the cluster needs this package and the models, at the same paths or from
    the hub. The function and the items are pickled. After an exception, submitted tasks run on
    until this process ends, because cancelling a task that is just ending can crash Ray.
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
            address: the cluster's; this machine must be part of the cluster. ``auto`` finds
                it. If neither this nor ``RAY_ADDRESS`` is given, a cluster of this machine
                alone is started, which ends with this process.
            set_up: what each worker calls before its first task of a call; it is pickled.
            cpus: how many CPUs a task needs.
            gpus: how many GPUs a task needs.

        Raises:
            ImportError: if Ray is not installed.
            ConnectionError: if no cluster answers at the address.
        """
        ray = _ray()
        self._set_up = set_up
        self._resources = {"num_cpus": cpus, "num_gpus": gpus}
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
            with _exiting_on_sigterm():
                # log_to_driver would mix what workers print with what the command prints.
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
        """Yield ``function(item)`` for each item, as the cluster returns it."""
        runs = [items[start : start + _RUN] for start in range(0, len(items), _RUN)]
        with _measuring(len(items), progress) as bar:
            for measured in self.results(self.submit(partial(_each, function), runs)):
                yield from measured
                bar.update(len(measured))

    def submit(
        self, function: Callable[[Item], Result], items: Sequence[Item], cpus: float | None = None
    ) -> list[Any]:
        """Submit a task for each item; return the tasks, for :meth:`results`.

        ``cpus`` replaces the usual number of CPUs per task. It is reduced to those of the
        largest machine: a task that needs more would wait for ever.
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
        """Yield the results of the tasks in order, or raise the first exception."""
        ray = _ray()
        try:
            for task in tasks:
                yield ray.get(task)
        except ray.exceptions.RayTaskError as error:
            # The function's own exception, as without Ray, not the worker's traceback.
            raise error.cause from error

    def wait(self, tasks: Sequence[Any]) -> None:
        """Return when all tasks have ended, whatever their results."""
        _ray().wait(tasks, num_returns=len(tasks), fetch_local=False)


def _each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def _apply(
    shared: tuple[str, Callable[[], None], str, Callable[[Item], Result]], item: Item
) -> Result:
    """Run in a worker: set it up if this is its first task of the call, and apply the function."""
    call, set_up, directory, function = shared
    _set_up_once(call, set_up, directory)
    return function(item)


@lru_cache(maxsize=1)
def _set_up_once(call: str, set_up: Callable[[], None], directory: str) -> None:
    """Set this worker up once for the call with this id."""
    if os.path.isdir(directory):
        os.chdir(directory)  # relative paths in a config start there
    set_up()


@contextmanager
def _exiting_on_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM, because the one that Ray sets up aborts the process.

    If there was no handler, exit in order on SIGTERM.
    """
    former = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        kept = former not in (signal.SIG_DFL, None)
        signal.signal(signal.SIGTERM, former if kept else _exit)


def _exit(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _require_listener(address: str) -> None:
    """Raise OSError if nothing listens at ``[ray://]HOST:PORT``; Ray itself tries for minutes."""
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
