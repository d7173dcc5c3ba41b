"""Docstrings of the public API name the arguments that there are, all of them and no others."""

import inspect
import re
from importlib.util import find_spec

import pytest

import bayeslora

# Their first line says what their one argument is.
ONE_LINERS = {"mbr.gsm8k_flexible", "mbr.gsm8k_strict", "unpatch", "uncertainty.decompose"}


def _public():
    for name in bayeslora.__all__:
        if name == "LightningCallback" and find_spec("lightning") is None:
            continue
        thing = getattr(bayeslora, name)
        if inspect.ismodule(thing):
            yield from ((f"{name}.{inner}", getattr(thing, inner)) for inner in thing.__all__)
        else:
            yield name, thing


def _documented():
    """Yield name, docstring and signature of each public function, method and class of ours."""
    for name, thing in _public():
        if not inspect.isclass(thing):
            yield name, thing.__doc__, inspect.signature(thing)
            continue
        if "Args:" in thing.__doc__:
            yield name, thing.__doc__, inspect.signature(thing)
        ours = [c for c in thing.__mro__ if c.__module__.startswith("bayeslora")]
        for attribute, value in [item for c in ours for item in vars(c).items()]:
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and not attribute.startswith(("_", "on_", "training_step")):
                yield f"{name}.{attribute}", function.__doc__, inspect.signature(function)


def _arguments(docstring):
    lines = inspect.cleandoc(docstring).splitlines()
    if "Args:" not in lines:
        return set()
    found = set()
    for line in lines[lines.index("Args:") + 1 :]:
        if line and not line.startswith(" "):
            break
        if match := re.match(r" {4}\**(\w+): ", line):
            found.add(match[1])
    return found


@pytest.mark.parametrize(
    ("name", "docstring", "signature"), [pytest.param(*d, id=d[0]) for d in _documented()]
)
def test_arguments(name, docstring, signature):
    parameters = set(signature.parameters) - {"self", "cls"}
    assert _arguments(docstring) == (set() if name in ONE_LINERS else parameters)


def test_arguments_end_where_the_next_section_begins():
    sections = "Args:\n    one: first,\n        two: of it.\n    **rest: others.\n\nRaises:\n    Error: no."
    assert _arguments(f"Do.\n\n{sections}") == {"one", "rest"}
