"""Every benchmark at least loads: what it needs of the product is still there."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py")))
def test_a_benchmark_loads(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__
