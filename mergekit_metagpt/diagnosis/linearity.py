"""Property 5 on the user's own models: how linear outputs are between base and expert."""

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

from mergekit_metagpt.core.task_vectors import working_dtype
from mergekit_metagpt.diagnosis.running import incomparable, interpolate, load
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.measure.vocabularies import tokenizers_agree

Names = tuple[str, ...]

ALPHAS = tuple(step / 10 for step in range(11))

# At most 16 forward passes for each α, and 32 positions × 4 tokens = 128 outputs.
_PROMPTS, _POSITIONS, _TOKENS = 16, 32, 4

# Smaller movements, relative to the size of the outputs, show rounding, not a task vector.
_RESOLUTION = 1e-5


@dataclass(frozen=True)
class Linearity:
    """The sampled outputs z_o(α) = f_o(θ_0 + α (θ_t − θ_0)) of one expert.

    Attributes:
        alphas: the values of α.
        expert: θ_t.
        outputs: z, float64 of shape [11, P, 4]: the α of ``ALPHAS``, the P places of a probe,
            and the tokens sampled at each place. An output is one logit.
        held: parameters that could not be compared and keep the base's values.
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

        The sums run over all outputs before the division, because the R² of a single output
        that hardly moves is noise. At most 1; NaN if the outputs do not move.
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
        positions: for each prompt, the positions where the logits of the next token are read.
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
            # Tokens after the last of these positions have no influence on the outputs.
            tuple(prompts[number][: max(at) + 1] for number, at in chosen.items()),
            tuple(map(tuple, chosen.values())),
        )

    @torch.no_grad()
    def logits(self, model: transformers.PreTrainedModel) -> Tensor:
        """Return the logits of the next token at every place, of shape [P, vocabulary].

        They are on the CPU.

        Raises:
            ValueError: if a logit is not finite.
        """
        # One prompt at a time, because architectures treat padding differently.
        logits = torch.cat(
            [
                model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, at].cpu()
                for ids, at in zip(self.prompts, map(list, self.positions), strict=True)
            ]
        )
        if not logits.isfinite().all():
            raise ValueError(
                f"The outputs of {model.name_or_path} overflow on the line to an "
                "expert; check that the base and its experts generate text."
            )
        return logits


def sample_tokens(base: Tensor, expert: Tensor, seed: int) -> Tensor:
    """Choose the tokens whose logits are followed: the most likely ones, and random ones.

    Args:
        base: logits at α = 0, of shape [P, vocabulary].
        expert: logits at α = 1, of the same shape.
        seed: for the random tokens.

    Returns:
        int64 of shape [P, 4]: the base's most likely token, the expert's most likely other
        token, and two more at random, all different. A vocabulary of fewer than 4 tokens
        gives fewer columns.
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
    """Measure outputs on the line from a base to each of its experts.

    The model runs in float32, or in float64 if it is stored in float64. Half precision would
    round away small steps along a task vector and add noise to the outputs. In float32 this
    takes 4 bytes of memory per parameter. Base and expert are memory-mapped files.

    Args:
        base: θ_0, a decoder-only language model.
        survey: the survey of the base and its T experts. Tensors that it left out keep the
            base's values.
        prompts: token ids, int64 of shape [L] each; at least one.
        options: MergeKit's options. The device, the random seed, the caches, and whether to
            trust remote code are used.
        progress: whether to show a progress bar.

    Returns:
        T results, in the order of the survey's experts.

    Raises:
        ValueError: if a model has a parameter that another lacks, or if outputs overflow.
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
            held = incomparable(start, end, _left_out(survey, base, expert, options))
            last = outputs(end, 1.0, held)
            tokens = sample_tokens(first, last, seed)
            # Between the ends, only the logits of the sampled tokens are kept, to save memory.
            between = [outputs(end, alpha, held).gather(-1, tokens) for alpha in ALPHAS[1:-1]]
            rows = [first.gather(-1, tokens), *between, last.gather(-1, tokens)]
            found.append(Linearity(expert, torch.stack(rows).double(), held))
            del end  # frees it before the next expert is loaded
    return found


def _left_out(
    survey: Survey, base: ModelReference, expert: ModelReference, options: MergeOptions
) -> Names:
    """Return the tensors that the survey left out because this expert's tokens differ.

    Different shapes need no list: the running models show them.
    """
    cache, trust = options.transformers_cache, options.trust_remote_code
    return () if tokenizers_agree(base, expert, cache, trust) else survey.left_out
