"""Property 5 on the user's own models: how straight outputs move from the base to an expert."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import ClassVar, cast

import torch
import tqdm
import transformers
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_metagpt.diagnosis.running import incomparable, interpolate, load
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.task_vectors import working_dtype

Names = tuple[str, ...]

ALPHAS = tuple(step / 10 for step in range(11))

# 16 forward passes for each α at most, and 32 positions × 4 tokens = 128 outputs.
_PROMPTS, _POSITIONS, _TOKENS = 16, 32, 4

# Outputs that move by less than this share of their size show rounding, not a task vector.
_RESOLUTION = 1e-5


@dataclass(frozen=True)
class Linearity:
    """The sampled outputs z_o(α) = f_o(θ_0 + α (θ_t − θ_0)) of one expert.

    Attributes:
        alphas: α.
        expert: θ_t.
        outputs: z, float64 of shape [11, P, 4] for the α of ``ALPHAS``, the P places of a
            probe and the tokens that were sampled at each; an output is one logit.
        held: parameters that could not be compared and stay at the base's.
    """

    alphas: ClassVar[tuple[float, ...]] = ALPHAS

    expert: ModelReference
    outputs: Tensor
    held: Names = ()

    @cached_property
    def line(self) -> Tensor:
        """z_o(0) + α (z_o(1) − z_o(0)), equation 8; of the outputs' shape."""
        alphas = torch.tensor(ALPHAS, dtype=self.outputs.dtype)[:, None, None]
        return torch.lerp(self.outputs[:1], self.outputs[-1:], alphas)

    @property
    def movement(self) -> float:
        """The root mean square of z_o(1) − z_o(0), in logits."""
        return (self.outputs[-1] - self.outputs[0]).square().mean().sqrt().item()

    @property
    def moves(self) -> bool:
        """Whether the outputs move by more than the rounding of float32."""
        size = self.outputs.square().mean().sqrt().item()
        return self.movement > _RESOLUTION * size

    @property
    def r_squared(self) -> float:
        """R² of the straight lines between the ends, pooled over the outputs.

        ::

            R² = 1 − Σ_o Σ_α (z_o(α) − line_o(α))² / Σ_o Σ_α (z_o(α) − mean_α z_o)²

        The sums are pooled before they are divided: an output that hardly moves has an R²
        of its own that is noise. At most 1; NaN if the outputs do not move.
        """
        misfit = (self.outputs - self.line).square().sum().item()
        spread = (self.outputs - self.outputs.mean(dim=0)).square().sum().item()
        return 1 - misfit / spread if self.moves else math.nan

    @property
    def largest_deviation(self) -> float:
        """Max |z_o(α) − line_o(α)| / max |z_o(1) − z_o(0)|, NaN if the outputs do not move."""
        deviation = (self.outputs - self.line).abs().max().item()
        most = (self.outputs[-1] - self.outputs[0]).abs().max().item()
        return deviation / most if self.moves else math.nan


@dataclass(frozen=True)
class Probe:
    """The P places where outputs are read.

    Attributes:
        prompts: token ids, int64 of shape [L] each.
        positions: for each prompt the positions whose next token is looked at.
    """

    prompts: tuple[Tensor, ...]
    positions: tuple[tuple[int, ...], ...]

    @classmethod
    def sample(cls, prompts: Sequence[Tensor], seed: int) -> "Probe":
        """Draw at most 16 prompts, and at most 32 positions in them."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(prompts), generator=generator).tolist()[:_PROMPTS]
        places = [(number, at) for number in sorted(drawn) for at in range(len(prompts[number]))]
        order = torch.randperm(len(places), generator=generator).tolist()[:_POSITIONS]
        chosen: dict[int, list[int]] = {}
        for number, at in sorted(places[index] for index in order):
            chosen.setdefault(number, []).append(at)
        return cls(
            # What follows the last position that is looked at has no influence on it.
            tuple(prompts[number][: max(at) + 1] for number, at in chosen.items()),
            tuple(map(tuple, chosen.values())),
        )

    @torch.no_grad()
    def logits(self, model: transformers.PreTrainedModel) -> Tensor:
        """Return the logits of the next token at every place, [P, vocabulary], on the CPU.

        Raises:
            ValueError: if they are not finite.
        """
        # One prompt at a time, since architectures differ in what padding does.
        logits = torch.cat(
            [
                model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, at].cpu()
                for ids, at in zip(self.prompts, map(list, self.positions), strict=True)
            ]
        )
        if not logits.isfinite().all():
            raise ValueError(
                f"The outputs of {model.name_or_path} overflow on the way to an expert; "
                "check that it and its experts generate text."
            )
        return logits


def sample_tokens(base: Tensor, expert: Tensor, seed: int) -> Tensor:
    """Choose the tokens whose logits are followed: where the models look, and elsewhere.

    Args:
        base: logits at α = 0, of shape [P, vocabulary].
        expert: logits at α = 1, of the same shape.
        seed: for the random tokens.

    Returns:
        int64 of shape [P, 4]: the base's favourite, the expert's favourite among the
        others, and two more at random, all different; fewer in a smaller vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(base.shape, generator=generator)
    first = base.argmax(dim=-1, keepdim=True)
    second = expert.scatter(-1, first, -math.inf).argmax(dim=-1, keepdim=True)
    scores.scatter_(-1, second, 2.0).scatter_(-1, first, 3.0)
    return scores.topk(min(_TOKENS, base.shape[-1]), dim=-1).indices


def measure_linearity(
    base: ModelReference,
    survey: Survey,
    prompts: Sequence[Tensor],
    *,
    options: MergeOptions,
    progress: bool = True,
) -> list[Linearity]:
    """Follow outputs from a base to each of its experts.

    The model runs in float32 whatever it is stored in (float64 for float64): half precision
    would round small steps along a task vector away and add noise to the outputs. That
    takes 4 bytes of memory per parameter; base and expert are mapped files.

    Args:
        base: θ_0, a decoder-only language model.
        survey: of the base and its T experts; tensors that it left out stay at the base's.
        prompts: token ids, int64 of shape [L] each; at least one.
        options: MergeKit's; the device, the random seed, trust and caches count here.
        progress: whether a progress bar is shown.

    Returns:
        T results, in the order of the survey's experts.

    Raises:
        ValueError: if a model holds a parameter that another lacks, or outputs overflow.
    """
    seed = options.random_seed or 0
    probe = Probe.sample(prompts, seed)
    stored = reduce(torch.promote_types, survey.dtypes.values())
    model = load(base, working_dtype(stored), options, options.device or "cpu")
    start = load(base, stored, options)
    found = []
    with tqdm.tqdm(
        total=1 + len(survey.experts) * (len(ALPHAS) - 1),
        desc="Running the models",
        unit="model",
        disable=not progress,
    ) as bar:

        def outputs(end: transformers.PreTrainedModel, alpha: float, held: Names = ()) -> Tensor:
            interpolate(model, start, end, alpha, held)
            bar.update()
            return probe.logits(model)

        first = outputs(start, 0.0)
        for expert in cast("tuple[ModelReference, ...]", survey.experts):
            end = load(expert, stored, options)
            held = incomparable(start, end, survey.left_out)
            last = outputs(end, 1.0, held)
            tokens = sample_tokens(first, last, seed)
            # Of the logits in between only those of the sampled tokens are kept.
            between = [outputs(end, alpha, held).gather(-1, tokens) for alpha in ALPHAS[1:-1]]
            rows = [first.gather(-1, tokens), *between, last.gather(-1, tokens)]
            found.append(Linearity(expert, torch.stack(rows).double(), held))
            del end  # before the next expert is loaded
    return found
