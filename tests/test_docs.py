"""The examples in docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import mergekit_metagpt

MODULES = [
    module.name
    for module in pkgutil.walk_packages(mergekit_metagpt.__path__, "mergekit_metagpt.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", ["mergekit_metagpt", *MODULES])
def test_docstring_examples_are_right(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
