"""Inputs that are broken or strange: a right merge or one clear sentence, never a bad model.

What only headers show is in test_cli_check.py.
"""

import math
import os
from collections.abc import Callable
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
from damages import NORM, both, cut, rewrite
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.scripts import merge_raw_pytorch, run_yaml

from mergekit_metagpt.cli import main

Config = dict[str, Any]
Models = dict[str, str]
Damage = Callable[[Models, Config], Any]
# What a command ends in: parts of its sentence, or a merge that an assertion accepts.
Outcome = tuple[str, ...] | Callable[[Path, Config], None]
DOWN, HEAD = "model.layers.1.mlp.down_proj.weight", "lm_head.weight"
TOO_LARGE = (NORM, "overflows torch.float16", "wider dtype")


def put(value: float, *names: str) -> Damage:
    """Write one number into a matrix of models."""

    def damage(models: Models, _: Config) -> None:
        for name in names:
            weight = read(models[name])[DOWN]
            weight[3, 5] = value
            rewrite(models[name], **{DOWN: weight})

    return damage


def replaced(model: str, tensor: torch.Tensor | None) -> Damage:
    return lambda models, _: rewrite(models[model], **{NORM: tensor})


def norms(*tensors: torch.Tensor) -> Damage:
    """Replace the last norm of the base, of a and of b."""
    return both(
        *(replaced(n, tensor) for n, tensor in zip(("base", "a", "b"), tensors, strict=True))
    )


def configured(**changes: Any) -> Damage:
    return lambda _, config: config.update(changes)


def setting(**parameters: Any) -> Damage:
    return lambda _, config: config["parameters"].update(parameters)


def convert(dtype: torch.dtype, *names: str) -> Damage:
    return lambda models, _: [
        rewrite(models[name], **{n: t.to(dtype) for n, t in read(models[name]).items()})
        for name in names
    ]


def copy_base(*names: str) -> Damage:
    return lambda models, _: [rewrite(models[name], **read(models["base"])) for name in names]


def assert_right(out: Path, config: Config) -> None:
    """Compare a merge with the reference; what has no numbers to merge is copied."""
    paths = [config["base_model"], *(it["model"] for it in config["models"])]
    merged, models = read(out), [read(path) for path in paths]
    weights = [name for name, it in merged.items() if it.is_floating_point() and it.numel()]
    for name in merged.keys() - weights:
        assert all(torch.equal(merged[name], model[name]) for model in models)
    base, *experts = ({name: model[name] for name in weights} for model in models)
    rows = reference.coefficients(base, experts, config["parameters"]["granularity"])
    assert merged.keys() == models[0].keys()
    # Float64 has the tolerance of float32.
    actual = {n: merged[n].float() if merged[n].dtype == torch.float64 else merged[n] for n in base}
    reference.assert_merged(actual, base, experts, rows)


def assert_base(out: Path, config: Config) -> None:
    merged, base = read(out), read(config["base_model"])
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[name], base[name]) for name in base)


def assert_infinite(out: Path, _: Config) -> None:
    """MergeKit rounds to out_dtype after the method, and writes Inf without a word."""
    assert not all(tensor.isfinite().all() for tensor in read(out).values())


ones, numbers = torch.ones, torch.arange(32)
half = torch.full((32,), 60000.0).half()
# How to break a merge, and what comes of it with ``mergekit-metagpt merge`` and ``mergekit-yaml``.
CASES: dict[str, tuple[Damage, Outcome, Outcome]] = {
    **{
        f"{value} in {name}": (put(value, name), said, said)
        for value, name in ((math.nan, "base"), (math.inf, "b"))
        for said in [(f"{os.sep}{name}", DOWN, "holds NaN or Inf", "repair or replace")]
    },
    "fp16 that overflows when subtracted": (
        norms(half, -half, half / 2), assert_right, assert_right
    ),
    "fp16 that overflows when scaled": (
        both(norms(half / 2, -half, half), setting(**{"lambda": 3})), TOO_LARGE, TOO_LARGE
    ),
    "float32 beyond an out_dtype of fp16": (
        both(put(1e6, "b", "a"), configured(dtype="float32", out_dtype="float16")),
        (DOWN, "overflows torch.float16", "out_dtype: bfloat16"),
        assert_infinite,
    ),
    "float32 beyond a dtype of fp16": (
        both(put(1e6, "b"), configured(dtype="float16")),
        (DOWN, f"{os.sep}b", "NaN or Inf"),
        (DOWN, f"{os.sep}b", "NaN or Inf"),
    ),
    "an expert that equals the base, at exponent 0": (
        both(copy_base("a"), setting(exponent=0)), assert_right, assert_right
    ),
    "experts that all equal the base, at exponent 0": (
        both(copy_base("a", "b"), setting(exponent=0)), assert_base, assert_base
    ),
    "weights that are all zero": (setting(weight=0), ("weight 0", "above 0"), assert_base),
    "empty tensors": (norms(ones(0), ones(0), ones(0)), assert_right, assert_right),
    "scalars": (norms(*map(torch.tensor, (1.0, 2.0, 4.0))), assert_right, assert_right),
    "integer buffers that agree": (norms(numbers, numbers, numbers), assert_right, assert_right),
    "integer buffers that differ": (
        norms(numbers, numbers, numbers + 1), (NORM, "differ"), (NORM, "differs")
    ),
    "an expert in int8": (
        replaced("b", ones(32, dtype=torch.int8)), (NORM, "I8", f"{os.sep}b"), (NORM, "differs")
    ),
    "an expert in fp8": (
        replaced("b", ones(32).to(torch.float8_e4m3fn)),
        (NORM, "F8_E4M3", f"{os.sep}b", "quantized"),
        ("Promotion", "Float8"),
    ),
    "checkpoints in float64": (
        convert(torch.float64, "base", "a", "b"), assert_right, assert_right
    ),
    "one expert in float64": (convert(torch.float64, "b"), assert_right, assert_right),
    "a base in bfloat16": (convert(torch.bfloat16, "base"), assert_right, assert_right),
    "a truncated file": (
        lambda models, _: cut(models["b"]), (f"{os.sep}b", "truncated"), ("not fully covered",)
    ),
    "a missing tensor": (replaced("b", None), (f"{os.sep}b", f"lacks tensor {NORM}"), (NORM,)),
    "a missing tensor of the base": (replaced("base", None), (NORM, "lacks"), (NORM,)),
    "another shape": (replaced("b", ones(33)), (NORM, "[33]", "[32]"), (NORM, "33", "32")),
}  # fmt: skip


def files(models: Models) -> dict[Path, bytes]:
    found = (file for path in models.values() for file in Path(path).rglob("*") if file.is_file())
    return {file: file.read_bytes() for file in found}


def merge(yml: Path, out: Path) -> tuple[Result, str]:
    """Merge with this package; return the outcome and what was said."""
    done = CliRunner().invoke(main, ["merge", str(yml), str(out), "--quiet"])
    assert isinstance(done.exception, SystemExit | None), repr(done.exception)
    if done.exit_code:
        (sentence,) = done.stderr.splitlines()
        assert sentence.endswith((".", "before merging"))  # MergeKit's own has no full stop
        assert not out.exists()
    assert not list(out.parent.glob("*partial*"))
    return done, done.stderr


def mergekit_yaml(yml: Path, out: Path) -> tuple[Result, str]:
    """Do the same with the stock command."""
    done = CliRunner().invoke(run_yaml.main, [str(yml), str(out), "--quiet"])
    return done, str(done.exception)


RUNS = [(name, merge, "model", 1) for name in CASES]
RUNS += [(name, mergekit_yaml, "tensor", 2) for name in CASES]
RUNS += [(name, mergekit_yaml, "model", 2) for name, case in CASES.items() if callable(case[2])]


@pytest.mark.parametrize(("name", "command", "granularity", "place"), RUNS)
def test_a_merge_ends_in_a_right_result_or_one_clear_sentence(
    name, command, granularity, place, own, tmp_path
):
    damage, wanted = CASES[name][0], CASES[name][place]
    config = merge_config(own, parameters={"granularity": granularity})
    damage(own, config)
    before = files(own)
    done, said = command(write_yaml(tmp_path / "metagpt.yml", config), tmp_path / "out")
    assert files(own) == before
    if callable(wanted):
        assert done.exit_code == 0, said
        wanted(tmp_path / "out", config)
    else:
        assert done.exit_code == 1
        assert all(part in said for part in wanted), said


COMMANDS = pytest.mark.parametrize("command", [merge, mergekit_yaml])


@COMMANDS
@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize("source", [None, "base", "union"])
def test_models_of_other_vocabularies_merge_token_by_token(
    source, granularity, command, own, tmp_path
):
    own["b"] = save_family(tmp_path / "larger", llama_config(vocab_size=66))["b"]
    if source:
        for name, path in own.items():
            save_tokenizer(path, *(f"w{number}" for number in range(66 if name == "b" else 64)))
    tokenizer, parameters = source and {"source": source}, {"granularity": granularity}
    config = merge_config(own, tokenizer=tokenizer, parameters=parameters)
    done, said = command(write_yaml(tmp_path / "metagpt.yml", config), tmp_path / "out")
    if source is None:
        assert done.exit_code == 1
        assert HEAD in said
        assert "tokenizer: {source: base}" in said
        return
    models, merged = [read(path) for path in own.values()], read(tmp_path / "out")
    vocabulary = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    rows = [int(word.removeprefix("w")) for word in sorted(vocabulary, key=vocabulary.__getitem__)]
    vocabularies = (HEAD, "model.embed_tokens.weight")
    for name in vocabularies:
        largest = models[-1][name]
        for model in models:  # what a model lacks is the other's
            model[name] = torch.cat([model[name], largest[len(model[name]) :]])[rows]
    base, *experts = models
    by_tensor = reference.coefficients(base, experts)
    if granularity == "model":  # vocabularies have the coefficients of all others
        rest = [{n: t for n, t in it.items() if n not in vocabularies} for it in models]
        shared, *_ = reference.coefficients(rest[0], rest[1:], "model").values()
        by_tensor = dict.fromkeys(base, shared)
    reference.assert_merged(merged, base, experts, by_tensor)


@COMMANDS
def test_tied_tensors_on_disk_merge_and_count_once(command, tmp_path):
    paths = save_family(tmp_path / "models", llama_config(tie_word_embeddings=True))
    config = merge_config(paths, parameters={"granularity": "model"})
    done, said = command(write_yaml(tmp_path / "metagpt.yml", config), tmp_path / "out")
    assert done.exit_code == 0, said
    assert HEAD not in read(tmp_path / "out")
    assert_right(tmp_path / "out", config)


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


def test_mergekit_pytorch_refuses_a_result_beyond_the_out_dtype(own, tmp_path):
    put(1e6, *own)(own, {})
    files = {name: str(Path(path, "model.safetensors")) for name, path in own.items()}
    config = merge_config(files, dtype="float32", out_dtype="float16")
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    done = CliRunner().invoke(merge_raw_pytorch.main, [str(yml), str(tmp_path / "out")])
    assert f"{DOWN} overflows torch.float16" in str(done.exception)


@on_posix
@COMMANDS
def test_on_a_disk_that_fills_up_merge_says_so_and_leaves_nothing(command, config, tmp_path):
    """A limit of bytes per file stands for a full disk where none can be mounted."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        done, said = command(config, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.exit_code == 1
    assert "File too large" in said
    assert command is mergekit_yaml or list(tmp_path.iterdir()) == [config]
