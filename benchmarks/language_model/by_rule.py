"""Merge checkpoints by a rule that MergeKit does not have, tensor by tensor."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from mergekit.io import LazyTensorLoader, TensorWriter
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from benchmarks.language_model.rules import Rule, matrices
from mergekit_metagpt.core.roles import Role, is_table, role_of


class Moved(NamedTuple):
    """A tensor of a base, and where its experts moved it, all in float32 and of one shape."""

    name: str
    role: Role
    base: Tensor
    taus: list[Tensor]


def task_vectors(base: Path, experts: Sequence[Path]) -> Iterator[Moved]:
    """Read all tensors of checkpoints, one after the other."""
    origin, *others = (LazyTensorLoader.from_disk(str(path)) for path in (base, *experts))

    def shape_of(name: str) -> Sequence[int] | None:
        return _read(origin, name).shape if name in origin.index.tensor_paths else None

    for name in origin.index.tensor_paths:
        start = _read(origin, name)
        taus = [_read(other, name) - start for other in others]
        yield Moved(name, role_of(name, start.shape, shape_of), start, taus)


def _read(loader: LazyTensorLoader, name: str) -> Tensor:
    tensor = loader.get_tensor(name)
    assert tensor is not None  # it raises an error instead
    return tensor.float()


@torch.no_grad()
def merge_by_rule(rule: Rule, tensors: Iterable[Moved], base: Path, out: Path, device: str) -> None:
    """Merge experts into a float32 checkpoint.

    Args:
        rule: how they are merged.
        tensors: their task vectors.
        base: the directory of their base, whose config and tokenizer the merge gets.
        out: the directory to write.
        device: the torch device to calculate on.
    """
    with TensorWriter(str(out)) as writer:
        for name, role, start, taus in tensors:
            merged = start.clone()
            role = Role.ROWS if is_table(name) else role
            views = (matrices(tensor, role) for tensor in (merged, *taus))
            for target, *parts in zip(*views, strict=True):
                if not any(part.any() for part in parts):
                    continue
                target += rule.of(role)(torch.stack(parts).to(device)).cpu()
            writer.save_tensor(name, merged)
    config = AutoConfig.from_pretrained(base)
    config.dtype = torch.float32
    config.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
