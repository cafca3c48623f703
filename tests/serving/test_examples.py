from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import serving

NAMES = [info.name for info in pkgutil.walk_packages(serving.__path__, "serving.")]


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings_run(name: str):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
