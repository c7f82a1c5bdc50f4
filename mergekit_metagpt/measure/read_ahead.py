"""Reading ahead: while one tensor is used, the disk already reads what follows it in its file."""

import json
import os
import struct
import threading
from functools import lru_cache

# How far to read ahead in each file, in bytes: more than a disk reads while a tensor is used.
_WINDOW = 1 << 27
# So many windows back is no jump: a layer's tensors are not used in the order of the file.
_BACK = 4


class _ReadAhead:
    """Asks the operating system for the next bytes of weight files; thread-safe.

    Weight files are mapped into memory. Without this, the disk rests while a tensor is used.
    It does nothing where there is no ``posix_fadvise``, as on macOS and Windows.
    """

    def __init__(self) -> None:
        self._asked: dict[str, int] = {}
        self._lock = threading.Lock()

    def begin(self, file: str, tensor: str) -> None:
        """Ask for a tensor that is used next, and for what follows it.

        Args:
            file: the path of a weight file; other kinds than safetensors are left alone.
            tensor: its name in the file.
        """
        if not (file.endswith(".safetensors") and hasattr(os, "posix_fadvise")):
            return
        start = _starts_of(file, os.stat(file).st_mtime_ns).get(tensor)
        if start is None:
            return
        with self._lock:
            asked = self._asked.get(file, 0)
            if not start <= asked <= start + _BACK * _WINDOW:  # the first tensor, or a jump
                asked = start
            if asked > start + _WINDOW // 2:
                return
            self._asked[file] = start + _WINDOW
        with open(file, "rb") as stream:
            os.posix_fadvise(
                stream.fileno(), asked, start + _WINDOW - asked, os.POSIX_FADV_WILLNEED
            )


AHEAD = _ReadAhead()


@lru_cache(maxsize=4096)
def _starts_of(file: str, changed: int) -> dict[str, int]:
    """Return the first byte of each tensor in a safetensors file."""
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
