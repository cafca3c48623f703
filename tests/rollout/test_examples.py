from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import rollout

NAMES = [info.name for info in pkgutil.walk_packages(rollout.__path__, "rollout.")]


@pytest.mark.parametrize("name", [n for n in NAMES if ".vllm" not in n])
def test_examples_in_docstrings_run(name: str):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
