"""model, serving < reward, rollout < align < stages: a package imports only what is on its left."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "model": {"model"},
    "serving": {"serving"},
    "reward": {"model", "serving", "reward"},
    "rollout": {"model", "serving", "rollout"},
    "align": {"model", "serving", "reward", "rollout", "align"},
    "stages": {"model", "serving", "reward", "rollout", "align", "stages"},
}


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = {n.module or "." for n in nodes if isinstance(n, ast.ImportFrom)}
    assert not any(n.level for n in nodes if isinstance(n, ast.ImportFrom)), f"{path}: relative"
    return {name.split(".")[0] for name in names | froms}


def test_a_package_imports_only_packages_to_its_left():
    files = [(room, path) for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 5
    for room, path in files:
        wrong = (imported(path) & set(MAY_IMPORT)) - MAY_IMPORT[room]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"
