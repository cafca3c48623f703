r"""The exact rule for mathematical answers.

The final answer is what stands in the last \boxed{}, else after the last "####" or "answer is",
else the last number of the response, or its last bracket where the reference is one (a tuple, an
interval). Plain numbers (commas, currency, percent, fractions, mixed numbers, exponents, units) are
compared here, as exact fractions; anything else goes to math-verify in its own process. Two units
that are both known and not the same make two numbers differ; other words after a number are not
compared.
"""

from __future__ import annotations

import re
from fractions import Fraction

from reward.types import Item, Verdict
from reward.verifiers.symbolic import shared_checker

_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+\u2212]?)\s?\\?[$€£¥]?\s?(?P<inner>[-\u2212]?)"
    r"(?:(?P<whole>\d+)\s(?=\d+\s?/\s?\d))?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})(?!\w))?"
    r"(?:\s?/\s?(?P<under>\d+))?"
    r"\s?(?P<percent>\\?%|percent\b)?"
)
# One letter is a unit only if it is a known one: 5x is no 5.
_UNIT = re.compile(r"(?:[A-Za-z°²³./ ]{2,}|[AFCJKLNVWghlmst°. ])?")
# Units that are told apart; names that mean the same stand in one row.
_UNITS = {
    name: row[0]
    for row in (
        ("mm",), ("cm",), ("m", "meter", "meters", "metre", "metres"), ("km",),
        ("inch", "inches"), ("ft", "foot", "feet"), ("yd", "yard", "yards"),
        ("mi", "mile", "miles"), ("mg",), ("g", "gram", "grams"), ("kg",),
        ("lb", "lbs", "pound", "pounds"), ("oz", "ounce", "ounces"), ("ml",),
        ("l", "liter", "liters", "litre", "litres"), ("s", "sec", "second", "seconds"),
        ("min", "minute", "minutes"), ("h", "hr", "hour", "hours"), ("day", "days"),
        ("cent", "cents"), ("dollar", "dollars"),
    )
    for name in row
}  # fmt: skip
_BRACKET = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_LESS = r"\s*(\\leq?(?:slant)?|\\lt|<=?|\u2264)\s*"
_CHAIN = re.compile(rf"(.+?){_LESS}[A-Za-z]{_LESS}(.+)")
_MARKER = re.compile(r"####|\banswer\s*(?:is\b|:|=)\s*:?|\banswer\b[^.\n]{0,40}?\bis\b", re.I)
_SENTENCE_END = re.compile(r"[.;!?](?=\s|$)|\n")
_SYMBOLIC = re.compile(r"[\\^√π]")


def verify_math(item: Item) -> Verdict:
    r"""1 if the response's final answer equals the reference answer as mathematics.

    A response without an answer is wrong (0); a comparison that failed or passed its time limit,
    and a reference that cannot be read, give valid=False.

    Raises: ValueError if the item has no answer.

    Example:
        >>> verify_math(Item((), "So she pays $1,250.00 in all.", answer="1250")).value
        1.0
        >>> verify_math(Item((), "9/2 = 4.5", answer="5")).reason
        '4.5 differs from 5'
    """
    gold = item.answer.rsplit("####", 1)[-1].strip().strip("$").strip()
    if not gold:
        raise ValueError(f"Item.answer = {item.answer!r} for verifier math; expected an answer")
    number = _number(gold)
    span, is_boxed = _final_answer(item.response)
    plain = _plain(span, is_boxed) if number and span else None
    if number and plain:
        return _verdict(_equal(number, plain), plain.group().strip(), gold)
    if number and not span and not _SYMBOLIC.search(item.response):
        numbers = list(_NUMBER.finditer(item.response))
        if not numbers:
            return Verdict(0.0, reason="no number in the response")
        return _verdict(_equal(number, numbers[-1]), numbers[-1].group().strip(), gold)
    is_bracket = _BRACKET.fullmatch(gold) is not None
    if is_bracket and not span and not _SYMBOLIC.search(item.response):
        span = (_BRACKET.findall(item.response) or [""])[-1]
    if is_bracket and (chain := _CHAIN.fullmatch(span)):
        span = _interval(*chain.groups())
    shown = f"\\boxed{{{span}}}" if span else item.response
    try:
        equal = shared_checker().equal(gold=gold, response=shown)
    except RuntimeError as error:
        return Verdict(0.0, valid=False, reason=str(error))
    if equal is None:
        return Verdict(0.0, reason="no answer in the response")
    return _verdict(equal, span or "the response", gold)


def _verdict(equal: bool, found: str, gold: str) -> Verdict:
    return Verdict(float(equal), reason=f"{found} {'equals' if equal else 'differs from'} {gold}")


def _number(text: str) -> re.Match[str] | None:
    """The number that the text is, with nothing but a unit after it."""
    match = _NUMBER.match(text.strip())
    return match if match and _UNIT.fullmatch(match.string[match.end() :]) else None


def _final_answer(response: str) -> tuple[str, bool]:
    """What the response marks as its answer, and whether by a box; "" if it marks none."""
    boxed = _last_boxed(response)
    if boxed:
        return boxed, True
    markers = list(_MARKER.finditer(response))
    if not markers:
        return "", False
    rest = response[markers[-1].end() :].strip(" :*")
    return _SENTENCE_END.split(rest, maxsplit=1)[0].strip().strip("$").strip(), False


def _last_boxed(response: str) -> str:
    start = response.rfind("\\boxed{")
    if start < 0:
        return ""
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, len(response)):
        depth += {"{": 1, "}": -1}.get(response[place], 0)
        if depth == 0:
            return response[begin:place].strip()
    return ""


def _plain(span: str, is_boxed: bool) -> re.Match[str] | None:
    """The number that a marked answer is; None where it takes mathematics to tell."""
    value = span.rsplit("=", 1)[-1].replace("\\$", "").replace("\\%", "%").strip().strip("$")
    value = re.sub(r"\\text\{[^{}]*\}|\\!|\\,", "", value).strip()
    if is_boxed or _SYMBOLIC.search(value):
        return _number(value)
    return _NUMBER.search(value)


def _interval(low: str, first: str, second: str, high: str) -> str:
    """a < x <= b as (a, b]."""
    closed = ["<" != sign != "\\lt" for sign in (first, second)]
    return f"{'[' if closed[0] else '('}{low}, {high}{']' if closed[1] else ')'}"


def _equal(gold: re.Match[str], found: re.Match[str]) -> bool:
    wanted, got = _value(gold), _value(found)
    units = {_unit(gold), _unit(found)} - {""}
    if wanted is None or got is None or len(units) == 2:
        return False
    is_percent = (bool(gold["percent"]), bool(found["percent"]))
    # One percent sign only: 20% is asked for and 20 or 0.2 given, or the other way round.
    if is_percent == (True, False):
        return got in (wanted, wanted / 100)
    if is_percent == (False, True):
        return wanted in (got, got / 100)
    return wanted == got


def _value(match: re.Match[str]) -> Fraction | None:
    under = int(match["under"] or 1)
    if under == 0:
        return None
    is_negative = (match["sign"] or match["inner"]) in ("-", "\u2212")
    number = Fraction(match["digits"].replace(",", "")) * Fraction(10) ** int(
        match["exponent"] or 0
    )
    value = int(match["whole"] or 0) + number / under
    return -value if is_negative else value


def _unit(match: re.Match[str]) -> str:
    """The known unit that follows a number, in its row's first name; "" for none."""
    word = re.match(r"\s*([A-Za-z]+)(?![\w^/])", match.string[match.end() :])
    return _UNITS.get(word[1].lower(), "") if word else ""
