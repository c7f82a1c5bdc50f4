"""Random numbers that depend on the seed and a tensor's name, and on nothing else of a merge."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from zlib import crc32

import torch

# Threads share a device's default generator, so only one may use it at a time.
_GENERATOR_LOCKS: defaultdict[str, RLock] = defaultdict(RLock)


@contextmanager
def own_stream(device: torch.device, name: str) -> Iterator[None]:
    """Give a tensor a random stream that depends on ``--random-seed`` and its name alone.

    DARE and DELLA draw from the default generator of the tensor's device. Afterwards the caller's
    state is restored.
    """
    accelerator = device.type != "cpu"
    with _GENERATOR_LOCKS[str(device)]:
        seed = crc32(f"{torch.initial_seed()}/{name}".encode())
        with torch.random.fork_rng(
            devices=[device] if accelerator else [],
            device_type=device.type if accelerator else "cuda",
        ):
            if accelerator:
                with torch.get_device_module(device).device(device):
                    torch.get_device_module(device).manual_seed(seed)
            else:
                torch.default_generator.manual_seed(seed)
            yield
