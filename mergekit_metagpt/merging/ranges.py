"""Checks that a merge does not overflow float16, to which MergeKit rounds it unchecked."""

from operator import itemgetter
from pathlib import Path

import torch
from mergekit.common import ModelPath, ModelReference, dtype_from_name

from mergekit_metagpt.wording import BadInputError


def require_in_range(merged: Path, out_dtype: str | None) -> None:
    """Read a merge back, and refuse it if it overflowed float16.

    In another ``out_dtype`` only numbers above 3.39e38 can overflow, which no model has; to find
    them, every such merge would be read back.
    """
    if dtype_from_name(out_dtype) != torch.float16:
        return
    overflowing = _overflowing(merged)  # by now its files are closed: Windows removes no open ones
    if overflowing:
        raise BadInputError(
            f"Merging tensor {overflowing} overflows {torch.float16}; set a wider one (out_dtype: "
            "bfloat16 or float32)."
        )


def _overflowing(merged: Path) -> str | None:
    """Return the name of a tensor that is not finite, or None."""
    # Not parsed from a string: the path may contain + and @, which references use.
    reference = ModelReference(model=ModelPath(path=str(merged)))
    loader = reference.lazy_loader(lazy_unpickle=False)
    for name, _ in sorted(loader.index.tensor_paths.items(), key=itemgetter(1)):  # by shard
        tensor = loader.get_tensor(name)
        if tensor is not None and not tensor.isfinite().all():
            return name
    return None
