"""Inputs that are broken or strange: a right merge or one clear sentence, never a bad model.

What only the preflight refuses is in test_cli_check.py.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers
from click.testing import CliRunner, Result
from conftest import (
    llama_config,
    merge_config,
    on_posix,
    read,
    save_family,
    save_tokenizer,
    write_yaml,
)
from damages import NORM, cut, edit_index, move_norm, rewrite
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.scripts import merge_raw_pytorch, run_yaml
from safetensors.torch import load_file

from mergekit_metagpt.cli import main

Config = dict[str, Any]
Models = dict[str, str]
Damage = Callable[[Models, Config], Any]
DOWN = "model.layers.1.mlp.down_proj.weight"
SAFETENSORS = "model.safetensors"
TOO_LARGE = (NORM, "overflows torch.float16", "wider dtype")

RIGHT = "the float64 reference"
BASE = "the base, bit for bit"
INFINITE = "a result with Inf"


@dataclass(frozen=True)
class Case:
    """How to break a merge and what is to come of it.

    Attributes:
        damage: changes models on disk and the config.
        whole: what ``mergekit-metagpt merge`` ends in: parts of its sentence, or a merge.
        stock: the same for the exception of ``mergekit-yaml``.
        or_right: whether the result of ``mergekit-yaml`` may be right as well.
        only_stock: what ``mergekit-yaml`` does that stock MergeKit alone could prevent.
    """

    damage: Damage
    whole: str | tuple[str, ...] = RIGHT
    stock: str | tuple[str, ...] = RIGHT
    or_right: bool = False
    only_stock: str = ""


def put(value: float, model: str) -> Damage:
    """Write one number into a matrix of one model."""

    def damage(models: Models, _: Config) -> None:
        weight = load_file(Path(models[model], SAFETENSORS))[DOWN]
        weight[3, 5] = value
        rewrite(models[model], **{DOWN: weight})

    return damage


def of_b(damage: Callable[[str], Any]) -> Damage:
    return lambda models, _: damage(models["b"])


def replaced(model: str, **tensors: torch.Tensor | None) -> Damage:
    return lambda models, _: rewrite(models[model], **tensors)


def norms(*tensors: torch.Tensor) -> Damage:
    """Replace the last norm of the base, of a and of b."""

    def damage(models: Models, _: Config) -> None:
        for path, tensor in zip(models.values(), tensors, strict=True):
            rewrite(path, **{NORM: tensor})

    return damage


def configured(**changes: Any) -> Damage:
    return lambda _, config: config.update(changes)


def setting(**parameters: Any) -> Damage:
    return lambda _, config: config.setdefault("parameters", {}).update(parameters)


def both(*damages: Damage) -> Damage:
    return lambda models, config: [damage(models, config) for damage in damages]


def convert(dtype: torch.dtype, *names: str) -> Damage:
    def damage(models: Models, _: Config) -> None:
        for name in names:
            tensors = load_file(Path(models[name], SAFETENSORS))
            rewrite(models[name], **{n: t.to(dtype) for n, t in tensors.items()})

    return damage


def copy_base(*names: str) -> Damage:
    def damage(models: Models, _: Config) -> None:
        for name in names:
            shutil.copy(Path(models["base"], SAFETENSORS), Path(models[name], SAFETENSORS))

    return damage


def listing(*names: str) -> Damage:
    """List these models of the family as the experts."""
    return lambda models, config: config.update(models=[{"model": models[n]} for n in names])


def list_link(models: Models, config: Config) -> None:
    link = Path(models["a"]).with_name("link")
    link.symlink_to(models["a"])
    config["models"].append({"model": str(link)})


def other_vocabulary(tokens: bool) -> Damage:
    def damage(models: Models, _: Config) -> None:
        other = save_family(Path(models["b"]).with_name("larger"), llama_config(vocab_size=66))
        shutil.rmtree(models["b"])
        shutil.move(other["b"], models["b"])
        shutil.rmtree(Path(other["base"]).parent)
        words = [f"w{number}" for number in range(66)]
        for name, path in models.items():
            if tokens:
                save_tokenizer(path, *words[: 66 if name == "b" else 64])

    return damage


ones = torch.ones
whole_numbers = torch.arange(32)
half = torch.full((32,), 60000.0).half()
CASES: dict[str, Case] = {
    **{
        f"{value} in {name}": Case(put(value, name), said, said)
        for value, name in ((math.nan, "base"), (math.inf, "b"))
        for said in [(f"{os.sep}{name}", DOWN, "holds NaN or Inf", "repair or replace")]
    },
    "fp16 that overflows when subtracted": Case(norms(half, -half, half / 2)),
    "fp16 that overflows when scaled": Case(
        both(norms(half / 2, -half, half), setting(**{"lambda": 3})), TOO_LARGE, TOO_LARGE
    ),
    "float32 beyond an out_dtype of fp16": Case(
        both(put(1e6, "b"), put(1e6, "a"), configured(dtype="float32", out_dtype="float16")),
        (DOWN, "overflows torch.float16", "out_dtype: bfloat16"),
        INFINITE,
        only_stock="it rounds to out_dtype after the method, and writes Inf without a word",
    ),
    "float32 beyond a dtype of fp16": Case(
        both(put(1e6, "b"), configured(dtype="float16")),
        (DOWN, f"{os.sep}b", "NaN or Inf"),
        (DOWN, f"{os.sep}b", "NaN or Inf"),
    ),
    "the base among the experts": Case(listing("a", "base", "b")),
    "an expert that equals the base, at exponent 0": Case(
        both(copy_base("a"), setting(exponent=0))
    ),
    "experts that all equal the base, at exponent 0": Case(
        both(copy_base("a", "b"), setting(exponent=0)), BASE, BASE
    ),
    "experts that all equal the base": Case(copy_base("a", "b"), BASE, BASE),
    "empty tensors": Case(norms(ones(0), ones(0), ones(0))),
    "scalars": Case(norms(*map(torch.tensor, (1.0, 2.0, 4.0)))),
    "integer buffers that agree": Case(norms(whole_numbers, whole_numbers, whole_numbers)),
    "integer buffers that differ": Case(
        norms(whole_numbers, whole_numbers, whole_numbers + 1), (NORM, "differ"), (NORM, "differs")
    ),
    "an expert in int8": Case(
        replaced("b", **{NORM: ones(32, dtype=torch.int8)}),
        (NORM, "I8", f"{os.sep}b"),
        (NORM, "differs"),
    ),
    "an expert in fp8": Case(
        replaced("b", **{NORM: ones(32).to(torch.float8_e4m3fn)}),
        (NORM, "F8_E4M3", f"{os.sep}b", "quantized"),
        ("Promotion", "Float8"),
    ),
    "checkpoints in float64": Case(convert(torch.float64, "base", "a", "b")),
    "one expert in float64": Case(convert(torch.float64, "b")),
    "a base in bfloat16": Case(convert(torch.bfloat16, "base")),
    "a truncated file": Case(of_b(cut), (f"{os.sep}b", "truncated"), ("not fully covered",)),
    "a stale index": Case(of_b(edit_index(move_norm)), (NORM, "stale"), (NORM,), or_right=True),
    "a missing tensor": Case(
        replaced("b", **{NORM: None}), (f"{os.sep}b", f"lacks tensor {NORM}"), (NORM,)
    ),
    "a missing tensor of the base": Case(
        replaced("base", **{NORM: None}), (NORM, "lacks"), (NORM,)
    ),
    "an extra tensor": Case(
        replaced("b", **{"head.weight": ones(2)}),
        ("head.weight", "would drop"),
        RIGHT,
        only_stock="it leaves tensors out that its description of the architecture lacks",
    ),
    "another shape": Case(
        replaced("b", **{NORM: ones(33)}), (NORM, "[33]", "[32]"), (NORM, "33", "32")
    ),
    "another vocabulary": Case(
        other_vocabulary(tokens=False),
        ("lm_head.weight", "[66, 32]", "tokenizer: {source: base}"),
        ("lm_head.weight", "(66, 32)", "tokenizer: {source: base}"),
    ),
    "another vocabulary, with the base's tokenizer": Case(
        both(other_vocabulary(tokens=True), configured(tokenizer={"source": "base"}))
    ),
    "another vocabulary, with the union of the tokenizers": Case(
        both(other_vocabulary(tokens=True), configured(tokenizer={"source": "union"}))
    ),
    **{
        f"{name}: {value}": Case(
            both(configured(merge_method="metagpt_ties"), setting(**{name: value})),
            (f"{name} must be",),
            (f"{name} must be",),
        )
        for name, value in [
            ("weight", -0.5),
            ("density", math.nan),
            ("lambda", math.inf),
            ("granularity", "layers"),
        ]
    },
    "weights that are all zero": Case(setting(weight=0), ("weight 0", "above 0"), BASE),
    "the same expert by a link": Case(
        list_link,
        ("under another name",),
        RIGHT,
        only_stock="it takes two paths of one directory for two models",
    ),
    "no expert": Case(listing("base"), ("no expert",), BASE),
}


@pytest.fixture
def models(family, tmp_path) -> Models:
    """A copy of the family that may be damaged."""
    for name, path in family.items():
        shutil.copytree(path, tmp_path / "models" / name)
    return {name: str(tmp_path / "models" / name) for name in family}


def fingerprints(directory: Path) -> dict[str, str]:
    """Return a hash of every file under a directory."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def unharmed(tmp_path) -> Iterator[Callable[[], None]]:
    """Call it when the inputs are complete; afterwards they have to be as they were."""
    before: list[dict[str, str]] = []
    yield lambda: before.append(fingerprints(tmp_path / "models"))
    assert before == [fingerprints(tmp_path / "models")]


def stock_merge(yml: Path, out: Path) -> Result:
    done = CliRunner().invoke(run_yaml.main, [str(yml), str(out), "--quiet"])
    assert (done.exit_code == 0) == (done.exception is None)
    return done


def whole_merge(yml: Path, out: Path) -> Result:
    done = CliRunner().invoke(main, ["merge", str(yml), str(out), "--quiet"])
    assert isinstance(done.exception, SystemExit | None), repr(done.exception)
    return done


def in_vocabulary(tensor: torch.Tensor, longest: torch.Tensor, out: Path) -> torch.Tensor:
    """Order rows as the merged tokenizer does; those that a model lacks are the other's."""
    whole = torch.cat([tensor, longest[len(tensor) :]])
    vocabulary = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    return whole[[int(word.removeprefix("w")) for word in words]]


def assert_right(out: Path, config: Config) -> None:
    """Compare a merge with the reference."""
    granularity = config.get("parameters", {}).get("granularity", "tensor")
    paths = dict.fromkeys([config["base_model"], *(m["model"] for m in config["models"])])
    models = [read(path) for path in paths]
    merged = read(out)
    assert merged.keys() == models[0].keys()
    alike = {
        name
        for name, tensor in merged.items()
        if tensor.is_floating_point()
        and tensor.numel()
        and all(m[name].shape == tensor.shape for m in models)
    }
    base, *experts = ({name: model[name] for name in sorted(alike)} for model in models)
    by_tensor = reference.coefficients(base, experts, granularity)
    for name in merged.keys() - alike:
        inputs = [model[name] for model in models]
        if not merged[name].is_floating_point() or not merged[name].numel():
            assert all(torch.equal(merged[name], tensor) for tensor in inputs)
            continue
        longest = max(inputs, key=len)
        base[name], *others = (in_vocabulary(tensor, longest, out) for tensor in inputs)
        for expert, tensor in zip(experts, others, strict=True):
            expert[name] = tensor
        by_tensor[name] = (
            by_tensor[NORM]
            if granularity == "model"
            else reference.coefficients({name: base[name]}, [{name: t} for t in others])[name]
        )
    actual = {
        name: merged[name].float() if merged[name].dtype == torch.float64 else merged[name]
        for name in base
    }
    reference.assert_merged(actual, base, experts, by_tensor)


def assert_base(out: Path, config: Config) -> None:
    merged, base = read(out), read(config["base_model"])
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[name], base[name]) for name in base)


def assert_outcome(
    done: Result, said: str, wanted: str | tuple[str, ...], out: Path, config: Config
):
    if isinstance(wanted, tuple):
        assert done.exit_code != 0
        for part in wanted:
            assert part in said
        return
    assert done.exit_code == 0, said
    {RIGHT: assert_right, BASE: assert_base, INFINITE: assert_infinite}[wanted](out, config)


def assert_infinite(out: Path, _: Config) -> None:
    assert not all(tensor.isfinite().all() for tensor in read(out).values())


@pytest.fixture
def broken(models, unharmed, tmp_path) -> Callable[[Case, str], tuple[Path, Config]]:
    """Do what a case says, and write its config."""

    def damage(case: Case, granularity: str) -> tuple[Path, Config]:
        config = merge_config(models)
        case.damage(models, config)
        config.setdefault("parameters", {}).setdefault("granularity", granularity)
        unharmed()
        return write_yaml(tmp_path / "metagpt.yml", config), config

    return damage


@pytest.mark.parametrize("name", CASES)
def test_merge_ends_in_a_right_result_or_one_clear_sentence(name, broken, tmp_path):
    case = CASES[name]
    yml, config = broken(case, "model")
    done = whole_merge(yml, tmp_path / "out")
    assert_outcome(done, done.stderr, case.whole, tmp_path / "out", config)
    if done.exit_code:
        assert done.exit_code == 1
        assert "Traceback" not in done.output
        sentence, *further = done.stderr.splitlines()
        assert not further or "index" in name
        assert sentence.endswith((".", "before merging"))  # MergeKit's own has no full stop
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*partial*"))


# What a survey may find first, too.
MEASURED = [name for name in CASES if CASES[name].stock in (RIGHT, BASE) or " in " in name]


@pytest.mark.parametrize(
    ("name", "granularity"),
    [*((name, "tensor") for name in CASES), *((name, "model") for name in MEASURED)],
)
def test_the_stock_command_makes_no_bad_model_that_a_method_could_prevent(
    name, granularity, broken, tmp_path
):
    case = CASES[name]
    yml, config = broken(case, granularity)
    done = stock_merge(yml, tmp_path / "out")
    wanted = RIGHT if case.or_right and done.exit_code == 0 else case.stock
    assert_outcome(done, str(done.exception), wanted, tmp_path / "out", config)
    assert wanted != INFINITE or case.only_stock


@pytest.mark.parametrize("command", [stock_merge, whole_merge])
def test_tied_tensors_on_disk_merge_and_count_once(command, unharmed, tmp_path):
    paths = save_family(tmp_path / "models", llama_config(tie_word_embeddings=True))
    unharmed()
    config = merge_config(paths, parameters={"granularity": "model"})
    done = command(write_yaml(tmp_path / "metagpt.yml", config), tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "lm_head.weight" not in read(tmp_path / "out")
    assert_right(tmp_path / "out", config)


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
def test_tensors_that_are_not_contiguous_merge(granularity):
    generator = torch.Generator().manual_seed(0)

    def model() -> dict[str, torch.Tensor]:
        wide = torch.randn(9, 14, generator=generator)
        return {"layers.0.w": wide.T, "layers.0.b": wide[::2, 3], "layers.1.w": wide[1:, ::3]}

    base, *experts = (model() for _ in range(3))
    merged = merge_state_dicts(
        [base, *experts], "metagpt", base=0, parameters={"granularity": granularity}
    )
    assert all(merged[name].is_contiguous() for name in base)
    by_tensor = reference.coefficients(base, experts, granularity)
    reference.assert_merged(merged, base, experts, by_tensor)


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (4, 1, 3)])
def test_what_della_cannot_rank_is_named_unless_it_need_not_rank_it(shape):
    models = [torch.full(shape, float(value)) for value in (1, 2, 4)]
    settings = {"density": 0.5, "epsilon": 0.1}
    with pytest.raises(ValueError, match="DELLA cannot rank the numbers of tensor w of shape"):
        merge_tensors(models, "metagpt_della", base_index=0, name="w", parameters=settings)
    settings = {"density": 1}
    whole = merge_tensors(models, "metagpt_della", base_index=0, name="w", parameters=settings)
    assert whole.shape == shape
    assert whole.isfinite().all()


@pytest.mark.parametrize(
    ("granularity", "dtype"), [("tensor", torch.float16), ("model", torch.bfloat16)]
)
def test_a_result_beyond_the_out_dtype_is_refused_in_memory(granularity, dtype):
    huge = torch.full((2, 3), torch.finfo(dtype).max * 2, dtype=torch.float64)
    models = [{"layers.0.w": huge}, {"layers.0.w": huge * 2}, {"layers.0.w": huge * 2}]
    with pytest.raises(ValueError, match=f"tensor layers.0.w overflows {dtype}"):
        merge_state_dicts(
            models, "metagpt", base=0, out_dtype=dtype, parameters={"granularity": granularity}
        )


def test_mergekit_pytorch_refuses_a_result_beyond_the_out_dtype(models, unharmed, tmp_path):
    config = {"dtype": "float32", "out_dtype": "float16"}
    for name in models:
        put(1e6, name)(models, {})
    unharmed()
    files = {name: str(Path(path, SAFETENSORS)) for name, path in models.items()}
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(files, **config))
    done = CliRunner().invoke(merge_raw_pytorch.main, [str(yml), str(tmp_path / "out")])
    assert f"{DOWN} overflows torch.float16" in str(done.exception)


def test_merge_does_not_write_over_an_input(models, unharmed, tmp_path):
    unharmed()
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(models))
    done = whole_merge(yml, Path(models["b"]))
    assert done.exit_code == 1
    assert "is the input model" in done.stderr


@on_posix
@pytest.mark.parametrize("command", [stock_merge, whole_merge])
def test_on_a_disk_that_fills_up_merge_says_so_and_leaves_nothing(
    command, models, unharmed, tmp_path
):
    """A limit of bytes per file stands for a full disk where none can be mounted."""
    import resource

    unharmed()
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(models))
    before = set(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        done = command(yml, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.exit_code == 1
    if command is stock_merge:
        assert "File too large" in str(done.exception)
        return
    assert done.stderr.startswith("Error: ")
    assert "File too large" in done.stderr
    assert "Traceback" not in done.output
    assert set(tmp_path.iterdir()) == before
