"""A cost model of surveys and merges on a cluster: seconds, from bytes and rates."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """A merge: the bytes of all models, of the output, and of one output file."""

    read: float
    written: float
    shard: float


@dataclass(frozen=True)
class Machines:
    """A cluster: bytes per second of each node's disk or network, and of shared storage."""

    nodes: int
    cores: int
    node_rate: float = math.inf
    shared_rate: float = math.inf

    @property
    def storage(self) -> float:
        """The bytes per second that storage gives to all nodes together."""
        return min(self.nodes * self.node_rate, self.shared_rate)


@dataclass(frozen=True)
class Times:
    """The seconds that a survey and a merge take."""

    survey: float
    merge: float


@dataclass(frozen=True)
class Line:
    """Seconds as a linear function of bytes: fixed seconds, and bytes per second per core."""

    fixed: float
    rate: float

    @classmethod
    def through(cls, less: tuple[float, float], more: tuple[float, float]) -> "Line":
        """Return the line through two runs, each given as bytes and seconds."""
        rate = (more[0] - less[0]) / (more[1] - less[1])
        return cls(less[1] - less[0] / rate, rate)

    def seconds(self, size: float, cores: float, storage: float) -> float:
        """Return the seconds for B bytes on c cores: fixed + B / min(rate · c, storage)."""
        return self.fixed + size / min(self.rate * cores, storage)


@dataclass(frozen=True)
class Model:
    """The cost of surveys by bytes read, and of merges by bytes read and written."""

    survey: Line
    merge: Line

    def predict(self, work: Work, machines: Machines) -> Times:
        """Return the times on a cluster, where a core works on one output file at a time."""
        cores = machines.nodes * machines.cores
        shards = math.ceil(work.written / work.shard)
        busy = shards / math.ceil(shards / cores)
        return Times(
            self.survey.seconds(work.read, cores, machines.storage),
            self.merge.seconds(work.read + work.written, busy, machines.storage),
        )
