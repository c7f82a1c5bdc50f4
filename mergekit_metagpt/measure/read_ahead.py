"""Reading ahead: while one tensor is used, the disk already reads what follows it in its file."""

import os
import threading

from mergekit_metagpt.measure.headers import read_header

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
        header = read_header(file, os.path.dirname(file)).get(tensor)
        if header is None:
            return
        start = header.start
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
