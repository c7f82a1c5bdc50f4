"""Details of MergeKit, torch and transformers that are not public API but used here.

A new release of one of them must pass these tests before ``pyproject.toml`` allows it.
"""

import json
from pathlib import Path

import mergekit.merge
from conftest import merge_config, problems_of
from mergekit.io.tasks import LoaderCache

from mergekit_metagpt import mergekit_private
from mergekit_metagpt.mergekit_private import PRIVATE


def test_private_names_are_there():
    for name in PRIVATE:
        assert getattr(mergekit_private, name) is not None


def test_loaders_are_shared_and_the_logger_of_run_merge_has_its_name():
    assert LoaderCache().loaders is mergekit_private.open_loaders
    assert mergekit.merge.LOG.name == mergekit_private.MERGE_LOGGER


def test_a_model_that_wants_its_own_code_is_told(own, tmp_path):
    file = Path(own["b"], "config.json")
    its = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config"}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **its}))
    (file.parent / "code.py").write_text("raise SystemExit('executed')")
    (sentence,) = problems_of(merge_config(own), tmp_path)
    assert "pass --trust-remote-code if you trust that code." in sentence
    file.write_text("{}")
    assert "--trust-remote-code" not in problems_of(merge_config(own), tmp_path)[0]
