"""Checks that a merge does not overflow the dtype that MergeKit rounds it to, unchecked."""

from operator import itemgetter
from pathlib import Path

import torch
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache

from mergekit_metagpt.measure.locations import Directory
from mergekit_metagpt.measure.weights import read_weights
from mergekit_metagpt.wording import BadInputError


def too_narrow(config: MergeConfiguration) -> str | None:
    """Return the ``out_dtype`` of a config if merged numbers can be too large for it.

    For float16, numbers of any dtype can. For bfloat16, float32 numbers above 3.39e38 are too
    large, but no model has them, and to find them every such merge would be read back. So they
    are ignored.
    """
    out = dtype_from_name(config.out_dtype)
    if out == torch.float16:
        return config.out_dtype
    if out is None or not out.is_floating_point or out == torch.float64:
        return None
    merged = {dtype_from_name(config.dtype)} if config.dtype else _stored_dtypes(config)
    return config.out_dtype if torch.float64 in merged else None


def _stored_dtypes(config: MergeConfiguration) -> set[torch.dtype | None]:
    places = {str(it): LoaderCache().get(it).index.base_path for it in config.referenced_models()}
    weights = [read_weights(Directory(str(path), model)) for model, path in places.items()]
    return {header.torch_dtype for each in weights for header in each.tensors.values()}


def require_in_range(merged: Path, out_dtype: str | None) -> None:
    """Read a merge back, and refuse it if it overflowed; without a dtype, none can have."""
    if out_dtype is None:
        return
    overflowing = _overflowing(merged)  # by now its files are closed: Windows removes no open ones
    if overflowing:
        name, dtype = overflowing
        wider = "bfloat16 or float32" if dtype == torch.float16 else "float64"
        raise BadInputError(
            f"Merging tensor {name} overflows {dtype}; set a wider one (out_dtype: {wider})."
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
