"""A model of what surveys and merges on a cluster cost: seconds, from bytes and rates."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """A merge: the bytes of all models, of the output, and of a file of that."""

    read: float
    written: float
    shard: float


@dataclass(frozen=True)
class Machines:
    """A cluster: bytes per second of a node's disk or network, and of what all nodes share."""

    nodes: int
    cores: int
    node_rate: float = math.inf
    shared_rate: float = math.inf

    @property
    def storage(self) -> float:
        """What storage yields to all nodes together, in bytes per second."""
        return min(self.nodes * self.node_rate, self.shared_rate)


@dataclass(frozen=True)
class Times:
    """Seconds that a survey and a merge take."""

    survey: float
    merge: float


@dataclass(frozen=True)
class Line:
    """Seconds against bytes: those that every run takes, and bytes per second of one core."""

    fixed: float
    rate: float

    @classmethod
    def through(cls, less: tuple[float, float], more: tuple[float, float]) -> "Line":
        """Draw the line through two runs, of bytes and seconds."""
        rate = (more[0] - less[0]) / (more[1] - less[1])
        return cls(less[1] - less[0] / rate, rate)

    def seconds(self, size: float, cores: float, storage: float) -> float:
        """Return what that many bytes take: with r, of a core, B / min(r c, storage)."""
        return self.fixed + size / min(self.rate * cores, storage)


@dataclass(frozen=True)
class Model:
    """What surveys cost by bytes read, and merges by bytes read and written."""

    survey: Line
    merge: Line

    def predict(self, work: Work, machines: Machines) -> Times:
        """Return what a cluster would take; a core works on one output file at a time."""
        cores = machines.nodes * machines.cores
        shards = math.ceil(work.written / work.shard)
        busy = shards / math.ceil(shards / cores)
        return Times(
            self.survey.seconds(work.read, cores, machines.storage),
            self.merge.seconds(work.read + work.written, busy, machines.storage),
        )
