"""The examples in docstrings run, and print what they say."""

import doctest
from importlib import import_module

import pytest

MODULES = ["bayeslora.mbr", "bayeslora.uncertainty"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_modules(name):
    found = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0
