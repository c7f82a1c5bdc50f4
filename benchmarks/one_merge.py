"""One merge in its own process: `python -m benchmarks.one_merge '{"config": …}'`.

Prints a line of JSON: the seconds and CPU seconds of MergeKit's ``run_merge``, without imports,
the peak resident memory of the process, and what it read from disks, in bytes.
"""

import json
import sys
import time
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from benchmarks.cold import disk_bytes


def main() -> None:
    """Merge as the argument says."""
    task = json.loads(sys.argv[1])
    config = MergeConfiguration.model_validate(task["config"])
    options = MergeOptions(
        quiet=True, copy_tokenizer=False, write_model_card=False, **task["options"]
    )
    options.apply_global_options()  # type: ignore[no-untyped-call]
    if options.device != "cpu":
        torch.ones(1, device=options.device)  # create the context first: it is not part of a merge
    read = disk_bytes()
    cpu, wall = time.process_time(), time.perf_counter()
    run_merge(config, task["out"], options)
    result = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": _peak_bytes(),
        "disk_bytes": disk_bytes() - read,
    }
    print("\n" + json.dumps(result))


def _peak_bytes() -> int:
    """Return the peak resident memory. ``getrusage`` would include the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM; run this on Linux.")


if __name__ == "__main__":
    main()
