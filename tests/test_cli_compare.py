"""``mergekit-metagpt compare``: other parameters of a config, from one survey."""

import json
import re

import pytest
from conftest import invoke, llama_config, merge_config, save_family, write_yaml


def compared(config, *words):
    return json.loads(invoke("compare", config, "--json", *words).stdout)["choices"]


def coefficients(folder, config):
    yml = write_yaml(folder / "one.yml", config)
    return json.loads(invoke("coefficients", yml, "--json").stdout)


def test_every_row_says_what_coefficients_says_of_that_choice(family, config, tmp_path, passes):
    found = compared(config)
    assert len(passes) == 1
    assert [(c["granularity"], c["exponent"]) for c in found] == [
        (granularity, exponent)
        for granularity in ("tensor", "layer", "model")
        for exponent in ("2", "1", "0")
    ]
    for choice in found[::4]:
        parameters = {"granularity": choice["granularity"], "exponent": float(choice["exponent"])}
        alone = coefficients(tmp_path, merge_config(family, parameters=parameters))
        assert choice["bound"] == alone["bound"]["merge"]
        for expert, expected in zip(choice["experts"], alone["experts"], strict=True):
            assert expert == {key: expected[key] for key in expert}


def test_priors_are_given_by_short_names_or_paths(family, config, tmp_path):
    words = ["--granularity", "model", "--exponent", "2"]
    words += ["--weights", "a=4", "--weights", f"{family['b']}=0,a=1"]
    own, first, second = compared(config, *words)
    assert own["weights"] is None
    assert first["weights"] == {family["a"]: 4}
    assert second["weights"] == {family["a"]: 1, family["b"]: 0}
    assert [expert["coefficient"] for expert in second["experts"]] == [1, 0]
    (a, b), (four_a, _) = ([it["coefficient"] for it in one["experts"]] for one in (own, first))
    assert four_a == pytest.approx(4 * a / (4 * a + b))


def test_direction_has_a_row_of_its_own_when_it_is_asked_for(config):
    first, *_, last = compared(config, "--granularity", "direction", "--granularity", "model")
    assert (first["granularity"], first["exponent"], first["bound"]) == ("direction", "0", None)
    assert all(expert["kept"] == expert["coefficient"] for expert in first["experts"])
    assert last["granularity"] == "model"


def test_it_shows_how_much_one_expert_dominates(tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.001, 0.01))
    config = write_yaml(tmp_path / "far.yml", merge_config(paths))
    found = compared(config, "--granularity", "model")
    assert [choice["dominated"] for choice in found] == [1, 1, 0]
    shown = invoke("compare", config, "--granularity", "model", "--exponent", 1).stdout
    assert re.search(r"^ model .* 100% *$", shown, re.MULTILINE)


def test_the_table_and_the_figure_show_every_choice(config, tmp_path):
    words = ["--weights", "a=4", "--plot", tmp_path / "compare.svg"]
    shown = invoke("compare", config, *words).stdout
    for text in ("tensor ", "layer ", "model ", "a 4", "1  a", "2  b", "bound", "dom."):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 80
    drawn = (tmp_path / "compare.svg").read_text()
    for text in ("metagpt; base base", "layer, exponent 1, a 4", "model, exponent 0"):
        assert drawn.count(f"<!-- {text} -->") == 1


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ("c=1", "'c=1' names no expert; write EXPERT=W, where EXPERT is a or b."),
        ("a", "'a' names no expert"),
        ("a=much", "'much' is not a valid float"),
        ("a=-1", "-1.0 is not in the range x>=0"),
    ],
)
def test_bad_weights_are_refused(weights, problem, config):
    done = invoke("compare", config, "--weights", weights, status=2)
    assert problem in " ".join(done.stderr.split())
