"""How exact the rules are on published rows: programs (MBPP) and numbers (GSM8K).

    python -m benchmarks.verifiers --data FOLDER [--rows N] [--threads N]

FOLDER holds `code/mbpp.jsonl.gz` and `math/gsm8k_train.jsonl.gz` in their publishers' fields. Every
reference must pass; every mutant of a reference (one operator, one constant or one return changed)
and every perturbed number must not. Some mutants compute the same on all of a task's asserts (an
unused constant, a branch that no assert takes), so each is also run the plain way, program and
asserts in one interpreter: what that lets through no verifier can fail. "caught" is the share of
the rest that the verifier fails; "agrees" is how often the two say the same.
"""

from __future__ import annotations

import argparse
import ast
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from align.data.benchmarks import gsm8k, mbpp
from align.data.files import parse, read_file
from align.data.records import Reading
from align.data.rows import ChatRow, Origin, PromptRow
from reward.sandbox import Limits, Sandbox, SandboxConfig
from reward.types import Item, Verdict
from reward.verifiers import verify
from reward.verifiers.code import extract_program

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
KINDS = ("operator", "constant", "return")


class Mutation(ast.NodeTransformer):
    """Changes the one site with this number; `sites` counts all that it could have changed."""

    def __init__(self, kind: str, site: int) -> None:
        self.kind = kind
        self.site = site
        self.sites = 0

    def _is_here(self, kind: str) -> bool:
        if kind != self.kind:
            return False
        self.sites += 1
        return self.sites - 1 == self.site

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if type(node.op) in OPERATORS and self._is_here("operator"):
            node.op = OPERATORS[type(node.op)]()
        return self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        if self._is_here("operator"):
            node.op = OPERATORS[type(node.op)]()
        return self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if type(node.ops[0]) in OPERATORS and self._is_here("operator"):
            node.ops[0] = OPERATORS[type(node.ops[0])]()
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        if not isinstance(value, bool | int | float | str) or not self._is_here("constant"):
            return node
        if isinstance(value, bool):
            return ast.Constant(not value)
        return ast.Constant(value + "x" if isinstance(value, str) else value + 1)

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if node.value is not None and self._is_here("return"):
            return ast.Return(ast.Tuple([node.value, ast.Constant(0)], ast.Load()))
        return self.generic_visit(node)


def mutant(program: str, kind: str, seed: int) -> str | None:
    """The program with one site of that kind changed; None if it has none.

    Example:
        >>> mutant("def f(a): return a + 1", "operator", seed=0)
        'def f(a):\\n    return a - 1'
    """
    counter = Mutation(kind, -1)
    counter.visit(ast.parse(program))
    if not counter.sites:
        return None
    tree = Mutation(kind, seed % counter.sites).visit(ast.parse(program))
    return ast.unparse(ast.fix_missing_locations(tree))


@dataclass(frozen=True)
class Trial:
    """A program of one task: the reference, or a mutant of it."""

    kind: str
    place: str
    item: Item


def records(path: Path) -> Iterator[tuple[Any, str]]:
    """Every record of a file, and its place."""
    for raw in read_file(path.name, path, 1):
        yield parse(raw), raw.place


def trials(path: Path, num_rows: int) -> Iterator[Trial]:
    """Reference and mutants of every task."""
    for number, (record, place) in enumerate(records(path)):
        if number == num_rows:
            return
        prompt, chat = (
            mbpp(record, Reading(Origin(place), kind))[0] for kind in ("prompt", "chat")
        )
        assert isinstance(prompt, PromptRow)
        assert isinstance(chat, ChatRow)
        answer = chat.messages[-1]["content"]
        yield Trial("reference", place, prompt.item(answer))
        for kind in KINDS:
            changed = mutant(extract_program(answer), kind, seed=number)
            if changed is not None:
                yield Trial(kind, place, prompt.item(f"```python\n{changed}\n```"))


def run_plainly(item: Item, sandbox: Sandbox) -> bool:
    """Whether program and asserts run to their end in one interpreter."""
    parts = [extract_program(item.response), item.arguments["setup"], *item.arguments["tests"]]
    return sandbox.run("\n".join(parts)).reason == "ok"


def judge_programs(path: Path, num_rows: int, threads: int, console: Console) -> None:
    # Many mutants loop for ever; the slowest reference computes for a second or two.
    limits = Limits(cpu_s=3, wall_s=15.0)
    sandbox = Sandbox(SandboxConfig(limits=limits, max_parallel=threads))
    console.print(f"isolation: {sandbox.isolation.name} {sandbox.isolation.missing}")
    tried = list(trials(path, num_rows))
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        verdicts = list(pool.map(lambda trial: verify(trial.item, sandbox), tried))
        took_s = time.perf_counter() - began
        plain = list(pool.map(lambda trial: run_plainly(trial.item, sandbox), tried))
    table = Table("programs", "judged", "no verdict", "pass all", "fail", "caught", "agrees")
    for kind in ("reference", *KINDS, "mutants"):
        chosen = [
            (verdict, passes)
            for trial, verdict, passes in zip(tried, verdicts, plain, strict=True)
            if trial.kind == kind or (kind == "mutants" and trial.kind in KINDS)
        ]
        valid = [(verdict.value == 1, passes) for verdict, passes in chosen if verdict.valid]
        passed = sum(value for value, _ in valid)
        faulty = [value for value, passes in valid if not passes]
        table.add_row(
            kind,
            str(len(valid)),
            str(len(chosen) - len(valid)),
            f"{passed} ({passed / len(valid):.1%})",
            f"{1 - passed / len(valid):.1%}",
            f"{1 - sum(faulty) / len(faulty):.2%} of {len(faulty)}" if faulty else "-",
            f"{sum(value == passes for value, passes in valid) / len(valid):.2%}",
        )
    console.print(table)
    console.print(f"{len(tried)} programs in {took_s:.0f} s on {threads} threads")
    for trial, verdict, passes in zip(tried, verdicts, plain, strict=True):
        is_odd = not verdict.valid or (verdict.value == 1) != passes
        if is_odd or (trial.kind == "reference" and verdict.value < 1):
            console.print(f"{trial.place} {trial.kind}: {verdict}; plain run passes: {passes}")


def judge_numbers(path: Path, num_rows: int, console: Console) -> None:
    counts: Counter[str] = Counter()
    began = time.perf_counter()
    for number, (record, place) in enumerate(records(path)):
        if number == num_rows:
            break
        chat, prompt = (
            gsm8k(record, Reading(Origin(place), kind))[0] for kind in ("chat", "prompt")
        )
        assert isinstance(chat, ChatRow)
        assert isinstance(prompt, PromptRow)
        answer = chat.messages[-1]["content"]
        counts["right"] += _is(verify(prompt.item(answer)), 1.0)
        counts["answers"] += 1
        gold, steps = int(prompt.answer), answer.rsplit("####", 1)[0]
        for wrong in (gold + 1, gold - 1, 10 * gold + 1, -gold - 1, gold + 0.5):
            counts["rejected"] += _is(verify(prompt.item(f"{steps}#### {wrong}")), 0.0)
            counts["perturbed"] += 1
    console.print(
        f"GSM8K: {counts['right']} of {counts['answers']} gold answers agree "
        f"({counts['right'] / counts['answers']:.2%}), {counts['rejected']} of "
        f"{counts['perturbed']} perturbed ones are rejected "
        f"({counts['rejected'] / counts['perturbed']:.2%}), {time.perf_counter() - began:.0f} s"
    )


def _is(verdict: Verdict, value: float) -> bool:
    return verdict.valid and verdict.value == value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with code/ and math/")
    parser.add_argument("--rows", type=int, default=-1, help="of each file; default all")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    console = Console(width=120)
    judge_numbers(given.data / "math" / "gsm8k_train.jsonl.gz", given.rows, console)
    judge_programs(given.data / "code" / "mbpp.jsonl.gz", given.rows, given.threads, console)


if __name__ == "__main__":
    main()
