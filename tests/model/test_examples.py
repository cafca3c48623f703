from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import model

NAMES = [info.name for info in pkgutil.walk_packages(model.__path__, "model.")]


# torch for CPU comes without triton, which these import at the top; what C became is no module
DEVICE_CODE = (".kernel", ".hopper", ".launch", "._passes")


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith(DEVICE_CODE)])
def test_examples_in_docstrings_run(name: str):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
