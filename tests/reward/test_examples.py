from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import reward

NAMES = [info.name for info in pkgutil.walk_packages(reward.__path__, "reward.")]


@pytest.mark.parametrize("name", [*NAMES, "align.queries"])
def test_examples_in_docstrings_run(name: str):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
