"""Long sequences of what people do to models and merges, in one process.

After each step the result is compared with the formula in float64, computed from what the files
hold now. So no cache, lock, record or leftover may outlive what it was made for. The sequences
are the same ones each time; ``pytest tests/test_sequences.py --fuzz 2000`` runs that many, which
differ from run to run. xdist's workers share them.
"""

import copy
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import safetensors.torch
import torch
import transformers
from conftest import read
from hypothesis import Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from written_models import EXPERTS, FULL, NORMS, SEED, SHAPES, Models, Setup

import mergekit_metagpt

FILES = 5  # of the output
PARTS = 8  # of the sequences
SAVE_FILE = safetensors.torch.save_file
VERSION = cache(version)

pairs = st.sampled_from(list(itertools.combinations(EXPERTS, 2)))
exponents = st.sampled_from([2, 0])
granularities = st.sampled_from(["tensor", "layer", "model", "direction"])
setups = st.builds(Setup, pairs, granularities, exponents) | st.builds(
    Setup, pairs, st.sampled_from(["tensor", "model"]), exponents, st.just("metagpt_dare_linear")
)
full, seeds, outs = st.sampled_from(FULL), st.integers(0, 3), st.sampled_from(["x", "y"])
errors = st.builds(KeyboardInterrupt) | st.builds(OSError, st.just(28), st.just("No space left"))


class Configs(transformers.AutoConfig):
    """Parses a config.json once; that takes 3 ms, and a merge asks for a model's ten times."""

    parse = cache(lambda path, content: transformers.AutoConfig.from_pretrained(path))

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> transformers.PretrainedConfig:
        return copy.deepcopy(cls.parse(path, Path(path, "config.json").read_bytes()))


@contextmanager
def caller_unharmed() -> Iterator[None]:
    """Assert that random numbers and threads are as they were."""

    def state() -> list[Any]:
        return [torch.initial_seed(), torch.get_num_threads(), torch.get_rng_state().tolist()]

    before = state()
    yield
    assert state() == before


class Sequences(RuleBasedStateMachine):
    """The steps. Each merge is of one of a few setups, so that most are repeated."""

    chosen = Bundle("chosen")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)  # the caller's
        in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.root = Path(tempfile.mkdtemp(dir=in_memory))
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv("XDG_CACHE_HOME", str(self.root / "cache"))
        self.patch.setattr(safetensors.torch, "save_file", self.save)
        self.patch.setattr("mergekit.common.AutoConfig", Configs)
        self.patch.setattr("mergekit_metagpt.measure.surveys.version", VERSION)
        self.models = Models(self.root / "models")
        self.place = self.root / "place"
        self.saved: list[bytes] = []  # the files of the output that a merge has written
        self.before_save: Callable[[], Any] = list
        # the files of merges that were stopped, by OUT, setup and files of the experts
        self.complete: dict[tuple[Any, ...], set[bytes]] = {}
        self.recorded: dict[str, tuple[bytes, ...]] = {}  # what the experts held, by `inputs`
        self.merged: dict[tuple[Any, ...], dict[str, bytes]] = {}  # files of complete merges

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.root)

    def save(self, tensors: dict[str, torch.Tensor], path: str, *args: Any, **kwargs: Any) -> None:
        self.before_save()
        SAVE_FILE(tensors, path, *args, **kwargs)
        self.saved.append(Path(path).read_bytes())

    def options(self, setup: Setup) -> MergeOptions:
        return MergeOptions(
            quiet=True, copy_tokenizer=False, write_model_card=False, out_shard_size=1000,
            lora_merge_cache=str(self.root / "lora cache"),
            random_seed=None if setup.method == "metagpt" else SEED,
        )  # fmt: skip

    def key(self, setup: Setup, out: str) -> tuple[Any, ...]:
        return out, setup, self.models.files(setup)

    def planned(self, setup: Setup) -> dict[str, Any]:
        return mergekit_metagpt.plan(
            self.models.config(setup), options=self.options(setup)
        ).as_json()

    def run(self, setup: Setup, out: str) -> dict[str, Any]:
        place, options = self.place / out, self.options(setup)
        return mergekit_metagpt.merge(self.models.config(setup), place, options=options).record

    def finish(self, setup: Setup, out: str, record: dict[str, Any]) -> None:
        """Look at a merge that is complete, and remove it."""
        assert record == json.loads((self.place / out / "metagpt.json").read_text())
        self.assert_merged(self.place / out, setup)
        self.assert_reported(record, setup)
        contents = self.models.contents(setup)
        assert self.recorded.setdefault(json.dumps(record["inputs"]), contents) == contents
        files = {f.name: f.read_bytes() for f in (self.place / out).glob("*.safetensors")}
        assert self.merged.setdefault((setup, contents), files) == files
        self.complete.pop(self.key(setup, out), None)
        shutil.rmtree(self.place / out)

    def assert_merged(self, out: Path, setup: Setup) -> None:
        merged, expected = read(out), self.models.expected(setup).merged
        assert merged.keys() == expected.keys()
        for name, tensor in merged.items():
            assert np.allclose(tensor.numpy(), expected[name], rtol=1e-5, atol=1e-5), name

    def assert_reported(self, report: dict[str, Any], setup: Setup) -> None:
        """Assert that the record of a merge, or a plan, is of this setup."""
        expected = self.models.expected(setup)
        models = [expert["model"] for expert in report["experts"]]
        order = [models.index(self.models.path(name)) for name in setup.experts]
        assert len(models) == len(order)
        scopes = {name: reference.scope(name, setup.granularity) for name in SHAPES}
        assert report["coefficients"].keys() == set(scopes.values())
        for name, scope in scopes.items():
            found = report["coefficients"][scope]
            norms = sum(expected.norms[n] for n in SHAPES if scopes[n] == scope)
            row = expected.rows[name]
            assert np.allclose(np.take(found["squared_norms"], order), norms, 1e-5, 0), name
            assert np.allclose(np.take(found["coefficients"], order), row, 0, 1e-4), name

    @contextmanager
    def refused_if_not_finite(self, setup: Setup) -> Iterator[None]:
        finite = self.models.are_finite(setup)
        with nullcontext() if finite else pytest.raises(ValueError, match="NaN"):
            yield

    @contextmanager
    def at_file(self, number: int, action: Callable[[], Any] | BaseException) -> Iterator[None]:
        """Do or raise something once, just before a merge writes a file of its output."""
        done: list[Any] = []

        def before_save() -> None:
            if len(self.saved) == number and not done:
                done.append(action)
                if isinstance(action, BaseException):
                    raise action
                action()

        self.saved.clear()
        self.before_save = before_save
        try:
            yield
        finally:
            assert done

    @initialize(target=chosen, first=setups, second=setups)
    def begin(self, first: Setup, second: Setup) -> Any:
        return multiple(first, second)

    @rule(target=chosen, setup=setups)
    def choose(self, setup: Setup) -> Setup:
        return setup

    @rule(expert=st.sampled_from(EXPERTS), seed=seeds, replace=st.booleans())
    def train(self, expert: str, seed: int, replace: bool) -> None:
        self.models.train(expert, seed, replace)

    @rule(expert=full)
    def train_without_effect(self, expert: str) -> None:
        self.models.put(expert, self.models.base)

    @rule(expert=full, norm=st.sampled_from(NORMS), by=st.sampled_from([1, torch.nan]))
    def change_one_norm(self, expert: str, norm: str, by: float) -> None:
        weights = self.models.stored[expert]
        self.models.put(expert, {**weights, norm: weights[norm] + by})

    @rule(setup=chosen)
    def plan(self, setup: Setup) -> None:
        setup = self.models.unambiguous(setup)
        with caller_unharmed(), self.refused_if_not_finite(setup):
            self.assert_reported(self.planned(setup), setup)

    @rule(setup=chosen)
    def survey(self, setup: Setup) -> None:
        base, *experts = map(self.models.path, ("base", *setup.experts))
        with caller_unharmed(), self.refused_if_not_finite(setup):
            found = mergekit_metagpt.survey(base, experts, options=self.options(setup))
            assert found.experts == experts
            norms = self.models.expected(setup).norms
            assert found.squared_norms == pytest.approx(sum(norms.values()), rel=1e-5)

    @rule(setup=chosen)
    def stock_merge(self, setup: Setup) -> None:
        setup = self.models.unambiguous(setup)
        if "lora" in setup.experts:
            return  # MergeKit itself finds an old adapter
        config = MergeConfiguration.model_validate(self.models.config(setup))
        with self.refused_if_not_finite(setup), torch.random.fork_rng():
            run_merge(config, str(self.place / "stock"), self.options(setup))
            self.assert_merged(self.place / "stock", setup)
        shutil.rmtree(self.place / "stock", ignore_errors=True)

    @rule(setup=chosen, out=outs)
    def merge(self, setup: Setup, out: str) -> None:
        setup = self.models.unambiguous(setup)
        self.saved.clear()
        with caller_unharmed(), self.refused_if_not_finite(setup):
            record = self.run(setup, out)
            complete = self.complete.get(self.key(setup, out), set())
            assert len(self.saved) + len(complete) == FILES  # it has gone on, if it could
            self.finish(setup, out, record)

    @precondition(lambda self: self.complete)
    @rule(number=st.integers(0, 3))
    def merge_again(self, number: int) -> None:
        stopped = list(self.complete)
        out, setup, _ = stopped[number % len(stopped)]
        self.merge(setup, out)
        self.merge(setup, out)  # without a stop; it has the same bytes

    @rule(setup=chosen, out=outs, files=st.integers(0, FILES - 1), error=errors)
    def stop(self, setup: Setup, out: str, files: int, error: BaseException) -> None:
        setup = self.models.unambiguous(setup)
        complete = self.complete.get(self.key(setup, out), set())
        if not self.models.are_finite(setup) or len(complete) > files:
            return
        stopped = pytest.raises((type(error), RuntimeError))
        with caller_unharmed(), stopped, self.at_file(files - len(complete), error):
            self.run(setup, out)
        assert not (self.place / out).exists()
        self.complete[self.key(setup, out)] = complete | set(self.saved)

    @rule(setup=chosen, out=outs, seed=seeds)
    def train_while_merging(self, setup: Setup, out: str, seed: int) -> None:
        setup, expert = self.models.unambiguous(setup), setup.experts[0]
        if self.models.are_finite(setup) and not self.complete.get(self.key(setup, out)):
            refused = pytest.raises(ValueError, match="changed")
            with refused, self.at_file(1, lambda: self.models.train(expert, seed)):
                self.run(setup, out)

    @rule(setup=chosen, other=chosen, what=st.sampled_from(["plan", "merge"]))
    def merge_in_two_threads(self, setup: Setup, other: Setup, what: str) -> None:
        setup, other = map(self.models.unambiguous, (setup, other))
        if not (self.models.are_finite(setup) and self.models.are_finite(other)):
            return
        with caller_unharmed(), ThreadPoolExecutor(1) as pool:
            running: list[Future[Any]] = []

            def start() -> None:
                work = (self.run, other, "y") if what == "merge" else (self.planned, other)
                running.append(pool.submit(*work))
                wait(running, timeout=0.02)

            with self.at_file(0, start):
                record = self.run(setup, "x")
            wait(running)  # what is expected needs torch's random numbers for itself
            self.finish(setup, "x", record)
            if what == "merge":
                self.finish(other, "y", running[0].result())
            else:
                self.assert_reported(running[0].result(), other)

    @invariant()
    def nothing_complete_is_lost(self) -> None:
        there = {file.read_bytes() for file in self.place.rglob("*") if file.is_file()}
        assert all(files <= there for files in self.complete.values())


@pytest.mark.parametrize("part", range(PARTS))
def test_no_sequence_goes_wrong(part, request):
    wanted = request.config.getoption("--fuzz")
    machine = type("Part", (Sequences,), {})
    run_state_machine_as_test(
        machine if wanted else seed(part)(machine),
        settings=settings(
            max_examples=wanted // PARTS if wanted else 6,
            stateful_step_count=12,
            derandomize=False,
            phases=[Phase.generate, Phase.shrink],
        ),
    )
