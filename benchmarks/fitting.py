"""Training, as the benchmarks do it."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORED = -100  # the label that transformers leaves out of the loss


def fit(
    model: transformers.PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    steps: int,
    rate: float,
    precision: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Train a model in place with AdamW, without weight decay, in one cycle of learning rates.

    Args:
        model: the model, on its device.
        batches: for each step what the model takes, and labels, all of shape [examples, tokens].
        steps: the number of batches.
        rate: the peak learning rate.
        precision: the context of each forward pass. It ends before the weights change, because
            autocast keeps the rounded weights until then.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for batch in batches:
        with precision():
            loss = answer_loss(model, **batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def answer_loss(model: transformers.PreTrainedModel, labels: Tensor, **inputs: Tensor) -> Tensor:
    """Return the mean loss of the labelled tokens, with logits from the first of them on only."""
    is_labelled = (labels != IGNORED).any(0)
    kept = labels.shape[1] - int(is_labelled.int().argmax())
    logits = model(**inputs, logits_to_keep=kept + 1).logits[:, :-1]
    return cross_entropy(logits.float().flatten(0, 1), labels[:, -kept:].flatten())
