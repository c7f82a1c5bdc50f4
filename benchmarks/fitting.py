"""Training, as the benchmarks do it."""

from collections.abc import Iterable

import torch
import transformers
from torch import Tensor

IGNORED = -100  # the label that transformers leaves out of the loss


def fit(
    model: transformers.PreTrainedModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    rate: float,
) -> None:
    """Train a model in place with AdamW, without weight decay, in one cycle of learning rates.

    Args:
        model: the model, on its device.
        batches: token ids and labels, both of shape [examples, tokens], for each step.
        steps: the number of batches.
        rate: the peak learning rate.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for ids, labels in batches:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
