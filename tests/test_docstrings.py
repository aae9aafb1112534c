"""Docstring examples run, with the fixtures that they ask for."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import plume
import plume_eval
import plume_train

#: Modules that need a library which only `make test-clients` installs.
ELSEWHERE = ("plume_eval.mteb_model",)


def modules() -> list[str]:
    names = []
    for package in (plume, plume_train, plume_eval):
        for one in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not one.name.endswith("__main__") and one.name not in ELSEWHERE:
                names.append(one.name)
    return names


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_module_say_what_happens(name, request):
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder()
    for test in finder.find(module, extraglobs={"getfixture": request.getfixturevalue}):
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
        assert result.failed == 0, f"{test.name}: see the output above"


def test_examples_exist():
    finder = doctest.DocTestFinder()
    total = sum(bool(test.examples) for name in modules() for test in finder.find(importlib.import_module(name)))
    assert total >= 15
