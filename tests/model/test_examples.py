from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import model

NAMES = [info.name for info in pkgutil.walk_packages(model.__path__, "model.")]


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith(".kernel")])
def test_examples_in_docstrings_run(name: str):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
