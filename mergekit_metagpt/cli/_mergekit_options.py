"""MergeKit's options by name, for ``--help`` and completion: to load the real ones takes seconds.

A test compares this list with MergeKit's own. The values are always read by those.
"""

import click

_OPTIONS = {
    "--allow-crimes/--no-allow-crimes": "Allow mixing architectures",
    "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings": (
        "UNSAFE: discard trailing embedding rows to match the smallest vocabulary. Assumes "
        "identical token IDs; use tokenizer configuration instead."
    ),
    "--transformers-cache": "Override storage path for downloaded models",
    "--lora-merge-cache": "Path to store merged LORA models",
    "--lora-merge-dtype": "Override dtype when applying LoRAs",
    "--cuda/--no-cuda": "Perform matrix arithmetic on GPU",
    "--device": "Perform matrix arithmetic on specified device",
    "--low-cpu-memory/--no-low-cpu-memory": (
        "Store results and intermediate values on accelerator. Useful if VRAM > RAM"
    ),
    "--out-shard-size": "Number of parameters per output shard  [default: 5B]",
    "--copy-tokenizer/--no-copy-tokenizer": "Copy a tokenizer to the output",
    "--clone-tensors/--no-clone-tensors": (
        "Clone tensors before saving, to allow multiple occurrences of the same layer"
    ),
    "--trust-remote-code/--no-trust-remote-code": (
        "Trust remote code from huggingface repos (danger)"
    ),
    "--random-seed": "Seed for reproducible use of randomized merge methods",
    "--lazy-unpickle/--no-lazy-unpickle": "Experimental lazy unpickler for lower memory usage",
    "--write-model-card/--no-write-model-card": "Output README.md containing details of the merge",
    "--safe-serialization/--no-safe-serialization": (
        "Save output in safetensors. Do this, don't poison the world with more pickled models."
    ),
    "-v": "Verbose logging (repeat for more verbosity)",
    "--quiet/--no-quiet": "Suppress progress bars and other non-essential output",
    "--read-to-gpu/--no-read-to-gpu": "Read model weights directly to accelerator",
    "--multi-gpu/--no-multi-gpu": "Use multi-gpu parallel graph execution engine",
    "--num-threads,-j": "Number of threads to use for parallel CPU operations",
    "--gpu-rich": "Alias for --cuda --low-cpu-memory --read-to-gpu --multi-gpu",
    "--async-write/--no-async-write": (
        "Write output shards asynchronously (faster execution, higher memory use)"
    ),
    "--write-threads": "Number of threads to use for asynchronous writes",
}
_INTEGERS = {"--random-seed", "--num-threads,-j", "--write-threads"}


def _option(names: str, text: str) -> click.Option:
    return click.Option(
        names.split(","),
        help=text,
        is_flag="/" in names or names == "--gpu-rich",
        count=names == "-v",
        type=int if names in _INTEGERS else None,
        metavar="SIZE" if "size" in names else None,
    )


SHOWN = [_option(names, text) for names, text in _OPTIONS.items()]
