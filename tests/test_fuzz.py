"""Random tensors against the float64 reference, and random damage to files.

A few hundred cases, the same ones each time; ``pytest tests/test_fuzz.py --fuzz 10000`` runs
that many, which differ from run to run.
"""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import reference
import torch
from click.testing import CliRunner
from conftest import merge_config, read, write_yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_state_dicts
from mergekit.scripts import run_yaml

from mergekit_metagpt.cli import main
from mergekit_metagpt.core import buffers, task_vectors
from mergekit_metagpt.method.notes import noted

StateDict = dict[str, torch.Tensor]
GRANULARITIES = ["tensor", "layer", "model"]
NAMES = ["layers.0.w", "layers.0.b", "layers.1.w", "embed", "layers.1.moe.experts.1.w"]
SHAPES = [
    (), (0,), (0, 3), (1,), (3,), (1, 9), (7, 5), (2, 3, 5), (3, 1, 1, 2), (4096,), (4097,),
    (67, 71), (129, 65), (8192,), (300, 211),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Run a test as often as its share of ``--fuzz`` asks for, or a few times."""
    wanted = request.config.getoption("--fuzz")

    def run(test: Callable[..., None], share: float, few: int) -> None:
        number = max(1, round(wanted * share)) if wanted else few
        chosen = settings(max_examples=number, derandomize=not wanted)
        chosen(given(data=st.data())(test))()

    return run


def as_laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Give a tensor other strides, and the same values."""
    if layout == "transposed":
        turned = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(turned).contiguous().permute(turned)
    if layout == "sliced":
        wide = torch.full((*tensor.shape, 3), torch.nan, dtype=tensor.dtype)
        wide[..., 1] = tensor
        return wide[..., 1]
    return tensor


@st.composite
def families(draw: st.DrawFn) -> tuple[StateDict, list[StateDict]]:
    """Draw a base and one to eight experts."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    names = draw(st.permutations(NAMES))[: draw(st.integers(1, len(NAMES)))]
    count = draw(st.integers(1, 8))
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1 + count, max_size=1 + count))
    if draw(st.booleans()):
        dtypes = dtypes[:1] * (1 + count)
    exponents = st.integers(-300, 300).map(lambda tenths: tenths / 10)
    even = draw(st.booleans())  # where all elements are equal, sums round alike
    origin = draw(st.one_of(exponents, st.none()))
    moves = [draw(st.one_of(exponents, st.none())) for _ in range(count)]
    if draw(st.booleans()):  # of one size, so that every coefficient matters
        moves = [moves[0]] * count
    layouts = st.sampled_from(["contiguous", "transposed", "sliced"])

    def noise(shape: tuple[int, ...], exponent: float | None) -> torch.Tensor:
        if exponent is None:
            return torch.zeros(shape, dtype=torch.float64)
        if even:
            return torch.full(shape, 1.1 * 10**exponent, dtype=torch.float64)
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 10**exponent

    def store(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        largest = torch.finfo(dtype).max
        return as_laid_out(values.clamp(-largest, largest).to(dtype), draw(layouts))

    base: StateDict = {}
    experts: list[StateDict] = [{} for _ in range(count)]
    for name in names:
        shape = draw(st.sampled_from(SHAPES))
        start = noise(shape, origin)
        base[name] = store(start, dtypes[0])
        for expert, exponent, dtype in zip(experts, moves, dtypes[1:], strict=True):
            expert[name] = store(start + noise(shape, exponent), dtype)
    return base, experts


def leaves_the_range(
    base: StateDict, experts: list[StateDict], rows: dict[str, np.ndarray], scale: float
) -> bool:
    """Return whether any exact result lies beyond the dtype that its inputs promote to."""
    for name, values in reference.merged(base, experts, rows, scale).items():
        dtype = task_vectors.promoted_dtype([base[name], *(e[name] for e in experts)])
        if values.size and abs(values).max() > 0.999 * torch.finfo(dtype).max:
            return True
    return False


def test_any_tensors_merge_as_the_float64_reference(fuzz):
    def case(data: st.DataObject) -> None:
        base, experts = data.draw(families())
        granularity = data.draw(st.sampled_from(GRANULARITIES))
        prior = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(1e-3, 10))
        priors = [data.draw(prior) for _ in experts]
        exponent = data.draw(st.one_of(st.just(2.0), st.floats(0, 4)))
        scale = data.draw(st.sampled_from([1.0, 1.0, 0.0, 0.3, 1.7, 3.0, -0.9, -2.0, 1e-6]))
        chunk = data.draw(st.sampled_from([1 << 19, 4096, 5000]))
        by_tensor = reference.coefficients(base, experts, granularity, priors, exponent)
        tolerance = 1e-6 * max(1.0, exponent / 2)
        ids = ["base", *(f"expert-{t}" for t in range(len(experts)))]
        if data.draw(st.booleans()):
            ids[1:] = ids[:0:-1]  # the canonical order is another than this one
        models = dict(zip(ids, (base, *experts), strict=True))
        parameters = {
            "granularity": granularity,
            "weight": dict(zip(ids[1:], priors, strict=True)),
            "exponent": exponent,
            "lambda": scale,
        }
        with (
            mock.patch.multiple(buffers, _CHUNK=chunk, _SCRATCH=buffers._Scratch()),
            noted() as entries,
        ):
            try:
                merged = merge_state_dicts(models, "metagpt", base="base", parameters=parameters)
            except ValueError as error:
                overflow = "overflows" in str(error)
                if not (overflow and leaves_the_range(base, experts, by_tensor, scale)):
                    raise
                return
        reference.assert_merged(merged, base, experts, by_tensor, scale, tolerance)
        for entry in entries:
            row = dict(zip(entry.experts, entry.coefficients, strict=True))
            shares = [row[id_] for id_ in ids[1:]]
            expected = by_tensor[entry.tensor]
            assert shares == pytest.approx(list(expected), rel=tolerance, abs=1e-250)
            assert sum(shares) == pytest.approx(1) or not any(expected)
        for name, tensor in merged.items():
            others = [expert[name] for expert in experts]
            assert tensor.dtype == task_vectors.promoted_dtype([base[name], *others])
            assert tensor.shape == base[name].shape

    fuzz(case, 0.98, 120)


def test_no_damage_to_a_header_makes_a_merge_crash_or_go_wrong(own, tmp_path, fuzz):
    file = Path(own["b"], "model.safetensors")
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    yml, out = write_yaml(tmp_path / "metagpt.yml", merge_config(own)), tmp_path / "out"
    words = [str(yml), str(out), "--quiet", "--no-copy-tokenizer"]
    assert CliRunner().invoke(run_yaml.main, words).exit_code == 0
    expected = read(out)
    shutil.rmtree(out)

    def case(data: st.DataObject) -> None:
        damaged = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            # The first bytes are the header's length, and worth a case more often.
            place = data.draw(st.one_of(st.integers(0, 7), st.integers(0, 7 + length)))
            damaged[place] = data.draw(st.integers(0, 255))
        file.write_bytes(damaged)
        ours = data.draw(st.booleans())
        done = CliRunner().invoke(*((main, ["merge", *words]) if ours else (run_yaml.main, words)))
        if done.exit_code:
            assert (done.stderr if ours else str(done.exception)).strip()
            assert not ours or ("Traceback" not in done.output and not out.exists())
        else:
            merged = read(out)
            assert all(torch.equal(merged[name], expected[name]) for name in expected)
        assert not list(tmp_path.glob("*partial*"))
        shutil.rmtree(out, ignore_errors=True)
        assert file.read_bytes() == damaged

    fuzz(case, 0.02, 30)
