"""The math rule: what counts as the final answer, what equals it, and what no verdict means."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from reward.types import Item, Verdict
from reward.verifiers import math as math_rule
from reward.verifiers import verify
from reward.verifiers.symbolic import SymbolicChecker


def judge(response: str, answer: str) -> Verdict:
    return verify(Item((), response, answer=answer, verifier="math"))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("5", "5"),
        ("The answer is 5.", "5"),
        ("2+3=5", "5"),
        ("10-5 = 5", "5"),
        ("She pays $1,234.50 in all.", "1234.5"),
        ("#### 72", "He sold 72 clips.\n#### 72"),
        ("The answer is 72 clips because 48+24 = 72", "72"),
        ("72 clips", "72 clips"),
        ("It is -3", "-3"),
        ("It is \u22123", "-3"),
        ("-$3", "-3"),
        ("51", "51.0"),
        ("1/2", "0.5"),
        ("20%", "20%"),
        ("20", "20%"),
        ("0.2", "20%"),
        ("20 percent", "20"),
        (r"So \boxed{1{,}000} no, \boxed{17}.", "17"),
        (r"\boxed{17\text{ cm}}", "17"),
        (r"\boxed{x = 17}", "17"),
        (r"**Answer:** 17", "17"),
        (r"Thus $\boxed{\frac{2}{4}}$.", "1/2"),
        (r"The answer is $\frac{1}{2}$.", r"\frac{1}{2}"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"The answer is $2\sqrt{3}$", r"\sqrt{12}"),
        (r"so $$x = \frac{14}{2}$$", "7"),
        ("The answer is D.", "D"),
        ("1 1/2", "1.5"),
        ("The answer is 2 1/2 cups", "2.5"),
        (r"\boxed{1\frac{1}{2}}", "1.5"),
        ("The answer is 1.5e3", "1500"),
        (r"\boxed{1.5 \times 10^3}", "1500"),
        (r"\boxed{50\%}", "0.5"),
        (r"\boxed{12\,\text{cm}^2}", r"12\text{ cm}^2"),
        ("The answer is 12 centimetres.", "12"),
        ("It takes 3 hrs", "3 hours"),
        (r"\boxed{90^\circ}", "90"),
        ("(3, -5)", "(3,-5)"),
        ("The point is (3, -5).", "(3,-5)"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        ("It is [1, 4]", "[1,4]"),
        (r"\boxed{(-\infty, 2]}", r"(-\infty,2]"),
        (r"\boxed{x \in [0,1]}", "[0,1]"),
        (r"\boxed{-3 \le x \le 5}", "[-3,5]"),
        (r"\boxed{0 < x \leq 5}", "(0,5]"),
        (r"\boxed{3+4i}", "4i+3"),
        (r"\boxed{\{1,2\}}", r"\{2,1\}"),
    ],
)
def test_an_equal_answer_is_right(response, answer):
    verdict = judge(response, answer)
    assert (verdict.value, verdict.valid) == (1.0, True), verdict


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("6", "5"),
        ("15", "5"),
        ("0.5", "5"),
        ("-5", "5"),
        ("The answer is 4. Or maybe 5", "5"),
        ("0.2%", "20%"),
        ("0.2", "20"),
        ("1/0", "1"),
        ("", "5"),
        ("I do not know.", "5"),
        (r"\boxed{5 or 6}", "5"),
        (r"\boxed{\frac{1}{3}}", "1/2"),
        ("The answer is C.", "D"),
        ("no mathematics", r"\sqrt{2}"),
        (r"\boxed{5x}", "5"),
        ("The answer is 12 km.", "12 cm"),
        ("The answer is 5 minutes.", "5 hours"),
        ("1 1/2", "0.5"),
        ("1.5e3", "1.5"),
        ("(2, 1)", "(1,2)"),
        ("It is [1, 5]", "[1,4]"),
        (r"\boxed{(0,1)}", "[0,1)"),
        (r"\boxed{-3 < x \le 5}", "[-3,5]"),
        (r"\boxed{(-\infty, 2)}", r"(-\infty,2]"),
    ],
)
def test_another_answer_is_wrong_and_valid(response, answer):
    verdict = judge(response, answer)
    assert (verdict.value, verdict.valid) == (0.0, True), verdict


def test_a_missing_reference_answer_is_an_error():
    with pytest.raises(ValueError, match=r"Item.answer = ' ' for verifier math; expected an"):
        judge("5", " ")


def test_a_comparison_past_its_limit_has_no_verdict_and_the_next_one_works(monkeypatch):
    checker = SymbolicChecker(limit_s=1.0)
    monkeypatch.setattr(math_rule, "shared_checker", lambda: checker)
    verdict = judge(r"\boxed{9^{9^{9^{9}}} - 1}", "x^2")
    assert verdict == Verdict(0.0, valid=False, reason="symbolic comparison passed 1 s")
    assert judge(r"\boxed{\frac{2}{4}}", r"\frac12") == Verdict(
        1.0, reason=r"\frac{2}{4} equals \frac12"
    )
    checker.close()


def test_a_child_that_died_is_replaced():
    checker = SymbolicChecker()
    assert checker.equal(gold="1/2", response=r"\boxed{0.5}")
    os.kill(checker._child.pid, signal.SIGKILL)
    checker._child.wait()
    assert checker.equal(gold="1/2", response=r"\boxed{1/3}") is False
    checker.close()


def test_a_child_that_dies_at_work_gives_no_verdict():
    checker = SymbolicChecker(limit_s=30.0)
    assert checker.equal(gold="1", response="1")
    killer = threading.Timer(0.3, checker._child.kill)
    killer.start()
    with pytest.raises(RuntimeError, match=r"symbolic comparison ended early \(out of memory\?\)"):
        checker.equal(gold="x^2", response=r"\boxed{9^{9^{9^{9}}} - 1}")
    killer.join()
    checker.close()


def test_a_reference_that_cannot_be_read_is_told():
    checker = SymbolicChecker()
    with pytest.raises(RuntimeError, match="cannot read the reference answer"):
        checker.equal(gold="}", response="5")
    checker.close()


def test_an_unreadable_reference_has_no_verdict():
    verdict = judge("5", r"\text{}")
    assert not verdict.valid
    assert verdict.reason == r"cannot read the reference answer '\\text{}'"


def test_threads_agree_with_the_main_thread_and_touch_no_signal():
    before = signal.getsignal(signal.SIGALRM)
    cases = [(rf"\boxed{{\frac{{{n}}}{{{2 * n}}}}}", r"\frac{1}{2}") for n in range(1, 9)]
    cases += [(f"it is {n}", "4") for n in range(8)]
    expected = [judge(*case) for case in cases]
    assert threading.current_thread() is threading.main_thread()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda case: judge(*case), cases)) == expected
    assert signal.getsignal(signal.SIGALRM) is before
