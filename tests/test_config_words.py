"""Configs of strangers: each mistake gets one sentence with its line or place, and the way out."""

import pytest
import transformers
import yaml
from conftest import merge_config, problems_of, save_tokenizer, slices_config, the_only

import mergekit_metagpt
from mergekit_metagpt.planning.config import read_config
from mergekit_metagpt.preflight import inspect
from mergekit_metagpt.wording import BadInputError

START = "merge_method: metagpt_ties\nbase_model: /m/base\nmodels:\n- model: /m/a\n"  # 4 lines

# What is in a file, and what is said of it.
TEXTS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "a key twice": (
        START + "parameters:\n  density: 0.5\n  density: 0.7\n",
        ("not YAML in line 7, column 3 (density is set twice, first in line 6)",),
    ),
    "a key twice below an alias": (
        "x: &x {a: 1}\ny:\n  <<: *x\n  a: 2\n  a: 3\n",
        ("line 5, column 3 (a is set twice, first in line 4",),
    ),
    "Latin-1": ((START + "# é").encode("latin-1"), ("at byte 72); save it as",)),
    "a control character": (START + "# \x07", ("#x0007",)),
    "no date": ("a: 1\nb: 2024-13-01\n", ("is not YAML (month",)),
    "an endless list": ("a: &a [*a]\n", ("is wrong at merge_method: Field required",)),
    "no mapping": ("", ("is not a mapping of keys",)),
}


@pytest.mark.parametrize("what", TEXTS)
def test_what_is_not_one_yaml_mapping_is_told_with_its_line(what, tmp_path):
    text, parts = TEXTS[what]
    file = tmp_path / "m.yml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInputError) as caught:
        inspect(str(file))
    the_only(caught.value.args[-1:], str(file), *parts)


@pytest.mark.parametrize(
    "text",
    ["\ufeffa: 1\n", "---\na: 1\n", "a: 1\n...\n", "a: 1\r\n", "a: 1", "<<: {a: 2}\na: 1"],
)
def test_other_ways_to_write_a_document_are_none_of_these(text, tmp_path):
    (tmp_path / "m.yml").write_bytes(text.encode())
    assert read_config(str(tmp_path / "m.yml")).raw == {"a": 1}


# Changes of a config, and the places that are named as wrong.
FORMS = {
    "models: [{a}, {b}]": ("models[0]: Input should be", "models[1]: Input should be"),
    "models: [{{modle: {a}}}]": ("models[0].model (it has modle): Field required",),
    "models: [{{1: 2}}]": ("models[0].model: Field required",),
    "slices: [{{sources: [{{model: {a}, layer_range: [0]}}]}}]": ("layer_range.1: Field required",),
    "base_model: a+b+c": ("Can't parse a+b+c",),
}


@pytest.mark.parametrize("change", FORMS)
def test_a_value_that_mergekit_cannot_read_is_named_with_its_place(change, family, tmp_path):
    config = {**merge_config(family, "metagpt_ties"), **yaml.safe_load(change.format(**family))}
    found = problems_of(config, tmp_path)
    assert len(found) == len(FORMS[change])
    for sentence, part in zip(found, FORMS[change], strict=True):
        assert f"m.yml is wrong{'' if 'parse' in part else ' at'}" in sentence
        assert part in sentence


def parameters(**settings):
    return lambda config: config.update(parameters=settings)


def of_first(**settings):
    return lambda config: config["models"][0].update(parameters=settings)


def of_base(config):
    base = {"model": config["base_model"], "parameters": {"weight": 0.2}}
    config["models"].insert(0, base)


def stock(method, **settings):
    return lambda config: config.update(merge_method=method, parameters=settings)


MLP, ALL = {"filter": "mlp", "value": 0.5}, {"value": 1}
IDLE = {
    "a misspelt filter": (
        parameters(density=[{**MLP, "filter": "mpl"}, ALL]),
        ("the filter mpl in the parameter density", "a part of a name as plain text, such as"),
    ),
    "a filter of a model": (
        lambda c: c["models"][1].update(parameters={"weight": [{**MLP, "filter": "mpl"}, ALL]}),
        ("the parameter weight at models[1] (/",),
    ),
    "after all tensors": (
        parameters(density=[ALL, MLP]),
        ("the filter mlp in the parameter density, whose value is never used",),
    ),
    "after a star": (
        parameters(density=[{**ALL, "filter": "*"}, ALL]),
        ("the filter * in the parameter density, whose value is never used",),
    ),
    "after a part": (
        parameters(density=[MLP, {**MLP, "filter": "mlp.down_proj"}, ALL]),
        ("mlp.down_proj in the parameter density", "never used", "write the narrower"),
    ),
    "a misspelt key of a value": (
        parameters(density=[{"fliter": "mlp", "value": 0.5}]),
        ("unknown key fliter at parameters.density[0]", "write filter instead"),
    ),
    "a misspelt parameter": (parameters(densitty=1), ("densitty", "write density instead")),
    "no number of a gradient": (
        of_first(density=[0.5, float("nan")]),
        ("models[0] (/", "density must be", "not nan"),
    ),
    "a word behind a filter": (of_first(weight=[{**MLP, "value": "x"}]), ("weight must", "'x'")),
    "no word of a stock method": (
        stock("ties", weight="x", density=1),
        ("Parameter weight must be a float, not 'x'",),
    ),
    "no finite weight": (stock("task_arithmetic", weight=float("nan")), ("weight must be finite",)),
    "no share of a stock method": (
        stock("dare_ties", weight=1, density=-0.5),
        ("density must be a number from 0 to 1, not -0.5",),
    ),
    "an empty list": (parameters(granularity=[]), ("granularity must be", "not []")),
    "an empty list behind a filter": (
        of_first(weight=[{**MLP, "value": []}, ALL]),
        ("models[0] (/", "weight must be", "not []"),
    ),
    "parameters where there are none": (
        lambda c: c["models"][0].update(
            model={"model": {"path": c["models"][0]["model"], "parameters": [1]}}
        ),
        ("unknown key parameters at models[0].model.model", "remove it"),
    ),
    "a weight of the base": (of_base, ("weight at models[0] (/", "is the base; remove it")),
    "a misspelt revision": (
        lambda c: c["models"][0].update(
            model={"model": {"path": c["models"][0]["model"], "revison": "x"}}
        ),
        ("unknown key revison at models[0].model.model", "write revision instead"),
    ),
    "a template that does not parse": (
        lambda c: c.update(chat_template="{% for m in messages %}\n{{ m.content }}"),
        ("chat_template that is neither a Jinja template nor", "in its line 2"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", IDLE)
def test_a_setting_that_does_nothing_is_named(what, family, tmp_path):
    change, parts = IDLE[what]
    config = merge_config(family, "metagpt_ties")
    change(config)
    the_only(problems_of(config, tmp_path), "m.yml", *parts)


def test_filters_are_looked_for_where_they_stand(family, tmp_path):
    config = slices_config(family, [[0, 1]], [[2, 3]])
    density = {"weight": [{"filter": "layers.2.", "value": 0.5}, ALL]}
    config["slices"][1]["sources"][1]["parameters"] = density
    assert not problems_of(config, tmp_path)
    config["slices"][0]["sources"][1]["parameters"] = density
    found = problems_of(config, tmp_path)
    the_only(found, "the filter layers.2. in", "at slices[0].sources[1] (/")


BASES, FIRST, SECOND = (f"{{{{ messages }}}} of the {name}" for name in ("base", "first", "second"))


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ((BASES, FIRST, SECOND), BASES),
        ((None, FIRST, SECOND), FIRST),
        ((None, SECOND, FIRST), SECOND),
        ((BASES, FIRST, FIRST), FIRST),
    ],
)
def test_of_equally_frequent_templates_the_first_is_taken(given, chosen, own, tmp_path):
    for path, template in zip(own.values(), given, strict=True):
        save_tokenizer(path, "the", "cat")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(path)
    out = mergekit_metagpt.merge(merge_config(own, chat_template="auto"), tmp_path / "out").path
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == chosen


def test_the_built_in_templates_parse(family, tmp_path):
    for template in (
        "chatml",
        "{% for m in messages %}{% generation %}{{ m.content | tojson }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    ):
        assert not problems_of(merge_config(family, chat_template=template), tmp_path)
