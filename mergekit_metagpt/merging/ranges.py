"""Checks that a merge does not overflow the dtype that MergeKit rounds it to, unchecked."""

from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

import torch
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache

from mergekit_metagpt.measure.locations import Directory
from mergekit_metagpt.measure.weights import read_weights
from mergekit_metagpt.wording import BadInputError


def may_overflow(out_dtype: str | None, merged: Iterable[torch.dtype]) -> bool:
    """Return whether numbers of the merged dtypes can be too large for the output's dtype.

    For float16, numbers of any dtype can. For bfloat16, float32 numbers above 3.39e38 are too
    large, but no model has them, and to find them every such merge would be read back. So they
    are ignored.
    """
    dtype = dtype_from_name(out_dtype)
    if dtype is None or not dtype.is_floating_point:
        return False
    return dtype == torch.float16 or (dtype != torch.float64 and torch.float64 in merged)


def dtypes_merged(config: MergeConfiguration) -> set[torch.dtype]:
    """Return the dtypes that a merge of this process has computed in."""
    dtype = dtype_from_name(config.dtype)
    if dtype is not None:
        return {dtype}
    found = set()
    for model in config.referenced_models():
        directory = str(LoaderCache().get(model).index.base_path)
        weights = read_weights(Directory(directory, str(model)))
        found |= {header.torch_dtype for header in weights.tensors.values()}
    return {dtype for dtype in found if dtype is not None}


def require_in_range(merged: Path, out_dtype: str | None) -> None:
    """Read a merge back, and refuse it if it overflowed its dtype.

    Args:
        merged: the directory that holds it.
        out_dtype: its dtype; None where no number can be too large for it.
    """
    if out_dtype is None:
        return
    overflowing = _overflowing(merged)  # by now its files are closed: Windows removes no open ones
    if overflowing:
        name, dtype = overflowing
        raise BadInputError(
            f"Merging tensor {name} overflows {dtype}; set a wider one (out_dtype: "
            f"{_wider(dtype)})."
        )


def _overflowing(merged: Path) -> tuple[str, torch.dtype] | None:
    """Return the name and the dtype of a tensor that is not finite, or None."""
    # Not parsed from a string: the path may contain + and @, which references use.
    reference = ModelReference(model=ModelPath(path=str(merged)))
    loader = reference.lazy_loader(lazy_unpickle=False)
    for name, _ in sorted(loader.index.tensor_paths.items(), key=itemgetter(1)):  # by shard
        tensor = loader.get_tensor(name)
        if tensor is not None and not tensor.isfinite().all():
            return name, tensor.dtype
    return None


def _wider(dtype: torch.dtype) -> str:
    return "bfloat16 or float32" if dtype == torch.float16 else "float64"
