"""Details of MergeKit, torch and transformers that are not public API but used here.

A new release of one of them must pass these tests before ``pyproject.toml`` allows it.
"""

import json

import mergekit.merge
import pytest
import transformers
from conftest import llama_config
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_metagpt import mergekit_private
from mergekit_metagpt.mergekit_private import PRIVATE


def test_private_names_are_there():
    for name in PRIVATE:
        assert getattr(mergekit_private, name) is not None


def test_loaders_are_shared_and_the_logger_of_run_merge_has_its_name():
    assert LoaderCache().loaders is mergekit_private.open_loaders
    assert mergekit.merge.LOG.name == mergekit_private.MERGE_LOGGER


def test_a_model_with_its_adapter_applied_is_kept_under_both_ids():
    model = ModelReference.model_validate("some/base+some/adapter")
    ids = [mergekit_private.unique_id(path) for path in (model.model, model.lora)]
    assert [id_.partition("_")[0] for id_ in ids] == ["base", "adapter"]


def test_a_model_that_wants_its_own_code_is_told(tmp_path):
    llama_config().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ValueError, match="trust_remote_code") as failure:
        transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert mergekit_private.wants_remote_code(failure.value)
    assert not mergekit_private.wants_remote_code(ValueError("something else"))
