"""One merge in a process of its own: `python -m benchmarks.one_merge '{"config": …}'`.

Prints a line of JSON: the seconds and CPU seconds of MergeKit's ``run_merge``, imports apart,
and the process's peak of resident memory in bytes.
"""

import json
import resource
import sys
import time

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main() -> None:
    """Merge as the argument says."""
    task = json.loads(sys.argv[1])
    config = MergeConfiguration.model_validate(task["config"])
    options = MergeOptions(
        quiet=True, copy_tokenizer=False, write_model_card=False, **task["options"]
    )
    options.apply_global_options()  # type: ignore[no-untyped-call]
    if options.device != "cpu":
        torch.ones(1, device=options.device)  # the context is no part of a merge
    cpu, wall = time.process_time(), time.perf_counter()
    run_merge(config, task["out"], options)
    result = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
