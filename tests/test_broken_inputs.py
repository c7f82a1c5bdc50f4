"""Inputs that are broken or strange: a right merge or one clear sentence, never a bad model."""

import hashlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
import transformers
from click.testing import CliRunner, Result
from conftest import llama_config, merge_config, on_posix, read, run, save_family, write_yaml
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.scripts import merge_raw_pytorch, run_yaml
from safetensors.torch import load_file
from test_cli_check import (
    cut,
    edit_index,
    lose_shard,
    move_norm,
    overwrite,
    remove,
    reshard,
    rewrite,
    save_tokenizer,
)

from mergekit_metagpt.cli import main

Config = dict[str, Any]
Models = dict[str, str]
Damage = Callable[[Models, Config], Any]
NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
SAFETENSORS = "model.safetensors"
GRANULARITIES = ["tensor", "layer", "model"]
HERE = str(Path(__file__).parent)

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


def truncate_shard(model: str) -> None:
    reshard(model)
    shard = sorted(Path(model).glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])


def corrupt_header(model: str) -> None:
    file = Path(model, SAFETENSORS)
    file.write_bytes(file.read_bytes()[:8] + b"}" + file.read_bytes()[9:])


def empty_directory(model: str) -> None:
    shutil.rmtree(model)
    Path(model).mkdir()
    Path(model, "notes.txt").write_text("not a model")


def list_base(models: Models, config: Config) -> None:
    config["models"].insert(1, {"model": models["base"]})


def list_twice(models: Models, config: Config) -> None:
    config["models"].append({"model": models["a"]})


def list_link(models: Models, config: Config) -> None:
    link = Path(models["a"]).with_name("link")
    link.symlink_to(models["a"])
    config["models"].append({"model": str(link)})


def list_nothing(models: Models, config: Config) -> None:
    config["models"] = []


def list_base_alone(models: Models, config: Config) -> None:
    config["models"] = [{"model": models["base"]}]


def no_base(_: Models, config: Config) -> None:
    del config["base_model"]


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
        f"{value} in {role}": Case(
            put(value, name),
            (DOWN, f"{os.sep}{name}", "holds NaN or Inf", "repair or replace"),
            (DOWN, f"{os.sep}{name}", "holds NaN or Inf", "repair or replace"),
        )
        for value in (math.nan, math.inf, -math.inf)
        for role, name in (("the base", "base"), ("an expert", "b"))
    },
    "fp16 that overflows when subtracted": Case(norms(half, -half, half / 2)),
    "fp16 that overflows when scaled": Case(
        both(norms(half / 2, -half, half), setting(**{"lambda": 3})),
        (NORM, "overflows torch.float16", "wider dtype"),
        (NORM, "overflows torch.float16", "wider dtype"),
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
    "the base among the experts": Case(list_base),
    "an expert that equals the base": Case(copy_base("a")),
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
        of_b(lambda b: rewrite(b, **{NORM: ones(32, dtype=torch.int8)})),
        (NORM, "I8", f"{os.sep}b"),
        (NORM, "differs"),
    ),
    "an expert in fp8": Case(
        of_b(lambda b: rewrite(b, **{NORM: ones(32).to(torch.float8_e4m3fn)})),
        (NORM, "F8_E4M3", f"{os.sep}b", "quantized"),
        ("Promotion", "Float8"),
    ),
    "checkpoints in float64": Case(convert(torch.float64, "base", "a", "b")),
    "one expert in float64": Case(convert(torch.float64, "b")),
    "a base in bfloat16": Case(convert(torch.bfloat16, "base")),
    "a truncated file": Case(of_b(cut), (f"{os.sep}b", "truncated"), ("not fully covered",)),
    "a truncated shard": Case(of_b(truncate_shard), ("model-00002-of", "truncated"), ("header",)),
    "a missing shard": Case(of_b(lose_shard), ("model-00002-of", "missing"), ("model-00002-of",)),
    "a corrupt header": Case(of_b(corrupt_header), (f"{os.sep}b", "corrupt"), ("header",)),
    "a stale index": Case(of_b(edit_index(move_norm)), (NORM, "stale"), (NORM,), or_right=True),
    "an index with a gap": Case(
        of_b(edit_index(lambda index: index.pop(NORM))), (NORM, "does not name"), (NORM,)
    ),
    "an empty file": Case(
        of_b(overwrite(SAFETENSORS, b"")), (f"{os.sep}b", "is empty"), ("header",)
    ),
    "no weights": Case(of_b(remove(SAFETENSORS)), (f"{os.sep}b", "no weights"), (f"{os.sep}b",)),
    "a directory that is no model": Case(
        of_b(empty_directory), (f"{os.sep}b", "no checkpoint"), (f"{os.sep}b",)
    ),
    "a model that is not there": Case(
        of_b(shutil.rmtree), (f"{os.sep}b", "does not exist"), (f"{os.sep}b",)
    ),
    "a missing tensor": Case(
        of_b(lambda b: rewrite(b, **{NORM: None})),
        (f"{os.sep}b", f"lacks tensor {NORM}"),
        (NORM,),
    ),
    "a missing tensor of the base": Case(
        lambda models, _: rewrite(models["base"], **{NORM: None}), (NORM, "lacks"), (NORM,)
    ),
    "an extra tensor": Case(
        of_b(lambda b: rewrite(b, **{"head.weight": ones(2)})),
        ("head.weight", "would drop"),
        RIGHT,
        only_stock="it leaves tensors out that its description of the architecture lacks",
    ),
    "another shape": Case(
        of_b(lambda b: rewrite(b, **{NORM: ones(33)})), (NORM, "[33]", "[32]"), (NORM, "33", "32")
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
            ("weight", math.nan),
            ("weight", math.inf),
            ("weight", "much"),
            ("density", -0.1),
            ("density", 1.5),
            ("density", math.nan),
            ("exponent", -1),
            ("exponent", math.nan),
            ("exponent", math.inf),
            ("lambda", math.nan),
            ("lambda", math.inf),
            ("granularity", "layers"),
        ]
    },
    "weights that are all zero": Case(setting(weight=0), ("weight 0", "above 0"), BASE),
    "the same expert twice": Case(list_twice, ("twice",), ("Duplicate",)),
    "the same expert by a link": Case(
        list_link,
        ("under another name",),
        RIGHT,
        only_stock="it takes two paths of one directory for two models",
    ),
    "no expert": Case(list_base_alone, ("no expert",), BASE),
    "no model": Case(list_nothing, ("Exactly one of",), ("Exactly one of",)),
    "no base": Case(no_base, ("no base_model",), ("base",)),
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


@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize("name", CASES)
def test_merge_ends_in_a_right_result_or_one_clear_sentence(name, granularity, broken, tmp_path):
    case = CASES[name]
    yml, config = broken(case, granularity)
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


@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize("name", CASES)
def test_the_stock_command_makes_no_bad_model_that_a_method_could_prevent(
    name, granularity, broken, tmp_path
):
    case = CASES[name]
    yml, config = broken(case, granularity)
    done = stock_merge(yml, tmp_path / "out")
    wanted = RIGHT if case.or_right and done.exit_code == 0 else case.stock
    assert_outcome(done, str(done.exception), wanted, tmp_path / "out", config)
    assert wanted != INFINITE or case.only_stock


@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize("command", [stock_merge, whole_merge])
def test_tied_tensors_on_disk_merge_and_count_once(command, granularity, unharmed, tmp_path):
    paths = save_family(tmp_path / "models", llama_config(tie_word_embeddings=True))
    unharmed()
    config = merge_config(paths, parameters={"granularity": granularity})
    done = command(write_yaml(tmp_path / "metagpt.yml", config), tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "lm_head.weight" not in read(tmp_path / "out")
    assert_right(tmp_path / "out", config)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_that_are_not_contiguous_merge(granularity, dtype):
    generator = torch.Generator().manual_seed(0)

    def model() -> dict[str, torch.Tensor]:
        wide = torch.randn(9, 14, generator=generator).to(dtype)
        return {"layers.0.w": wide.T, "layers.0.b": wide[::2, 3], "layers.1.w": wide[1:, ::3]}

    base, *experts = (model() for _ in range(3))
    merged = merge_state_dicts(
        [base, *experts], "metagpt", base=0, parameters={"granularity": granularity}
    )
    assert all(merged[name].is_contiguous() for name in base)
    actual = {n: t.float() if dtype == torch.float64 else t for n, t in merged.items()}
    by_tensor = reference.coefficients(base, experts, granularity)
    reference.assert_merged(actual, base, experts, by_tensor)


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (4, 1, 3)])
@pytest.mark.parametrize("method", ["metagpt_della", "metagpt_della_linear"])
def test_what_della_cannot_rank_is_named_unless_it_need_not_rank_it(method, shape):
    models = [torch.full(shape, float(value)) for value in (1, 2, 4)]
    settings = {"density": 0.5, "epsilon": 0.1}
    with pytest.raises(ValueError, match="DELLA cannot rank the numbers of tensor w of shape"):
        merge_tensors(models, method, base_index=0, name="w", parameters=settings)
    whole = merge_tensors(models, method, base_index=0, name="w", parameters={"density": 1})
    assert whole.shape == shape
    assert whole.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
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


@pytest.mark.parametrize("role", ["base", "b"])
def test_merge_does_not_write_over_an_input(role, models, unharmed, tmp_path):
    unharmed()
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(models))
    done = whole_merge(yml, Path(models[role]))
    assert done.exit_code == 1
    assert "is the input model" in done.stderr


@pytest.mark.parametrize("role", ["base", "b"])
def test_the_stock_command_writes_over_an_input_which_only_stock_mergekit_could_prevent(
    role, models, tmp_path
):
    config = merge_config(models)
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    stock_merge(yml, tmp_path / "expected")
    stock_merge(yml, Path(models[role]))
    written, expected = read(models[role]), read(tmp_path / "expected")
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@on_posix
class TestFullDisk:
    """A limit of bytes per file stands for a full disk where none can be mounted."""

    LIMITED = """
import resource, sys
from click.testing import CliRunner
from mergekit.scripts import run_yaml
from mergekit_metagpt.cli import main
from test_broken_inputs import stock_merge, whole_merge

command, config, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
done = {"stock": stock_merge, "whole": whole_merge}[command](config, out)
print(done.exit_code, done.stderr, repr(done.exception))
"""

    def limited(self, command: str, yml: Path, out: Path) -> str:
        done = run(sys.executable, "-c", self.LIMITED, command, yml, out, PYTHONPATH=HERE)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @pytest.fixture
    def yml(self, models, unharmed, tmp_path) -> Path:
        unharmed()
        return write_yaml(tmp_path / "metagpt.yml", merge_config(models))

    @pytest.fixture
    def disk(self, tmp_path) -> Iterator[Path]:
        """A file system of 64 kB."""
        place = tmp_path / "disk"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)]
        if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        yield place
        subprocess.run(["umount", str(place)], check=True)

    def test_merge_says_so_and_leaves_nothing(self, yml, tmp_path):
        before = set(tmp_path.iterdir())
        said = self.limited("whole", yml, tmp_path / "out")
        assert said.startswith("1 Error: ")
        assert "File too large" in said
        assert "Traceback" not in said
        assert set(tmp_path.iterdir()) == before

    def test_the_stock_command_fails(self, yml, tmp_path):
        said = self.limited("stock", yml, tmp_path / "out")
        assert said.startswith("1 ")
        assert "File too large" in said

    def test_merge_looks_at_the_disk_before_it_writes(self, yml, disk):
        done = whole_merge(yml, disk / "out")
        assert done.exit_code == 1
        assert "make room" in done.stderr
        assert not list(disk.iterdir())

    def test_merge_on_a_disk_that_fills_up_meanwhile_leaves_nothing(self, yml, disk, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
        done = whole_merge(yml, disk / "out")
        assert done.exit_code == 1
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.output
        assert not list(disk.iterdir())

    def test_the_stock_command_fails_on_a_full_disk(self, yml, disk):
        assert "No space left on device" in str(stock_merge(yml, disk / "out").exception)
