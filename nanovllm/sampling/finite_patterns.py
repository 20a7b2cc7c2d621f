"""How many texts a regular expression matches, where they are few."""

from __future__ import annotations

import functools
import re
from typing import Any

try:
    from re import _parser as sre_parse  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse

NUM_CHARACTERS = 1_000  # stands for those of a class that are not listed


def count_matches(pattern: str, limit: int) -> int:
    """How many texts hold a match of `pattern`, at most `limit`.

    A text that matches in several ways may count as often.
    A pattern that is not anchored at both ends matches texts of any length, hence `limit`. So does,
    for want of knowing better, one that Python cannot read: llguidance judges that.
    """
    try:
        items = sre_parse.parse(pattern)
        is_anchored = _is_anchored(items, 0, "AT_BEGINNING") and _is_anchored(items, -1, "AT_END")
        return _count(items, limit) if is_anchored else limit
    except (re.error, RecursionError, OverflowError):
        return limit


def _is_anchored(items: Any, index: int, anchor: str) -> bool:
    """Whether all ways through `items` begin (index 0) or end (-1) with the anchor."""
    if not len(items):
        return False
    op, value = items[index]
    if str(op) == "AT":
        return str(value).startswith(anchor)
    if str(op) == "SUBPATTERN":
        return _is_anchored(value[-1], index, anchor)
    return str(op) == "BRANCH" and all(_is_anchored(b, index, anchor) for b in value[1])


def _count(items: Any, limit: int) -> int:
    product = 1
    for op, value in items:
        product = min(limit, product * _count_item(str(op), value, limit))
    return product


def _count_item(op: str, value: Any, limit: int) -> int:
    if op == "LITERAL":
        return 1
    if op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        low, high, items = value
        once = _count(items, limit)
        if once == 0:
            return int(low == 0)
        width = sre_parse.SubPattern(items.state, list(items)).getwidth()[1]
        if width == 0:
            return 1
        if high == sre_parse.MAXREPEAT or high - low >= limit:
            return limit
        if once == 1:
            return int(high) - int(low) + 1
        powers = (min(limit, once ** min(times, 20)) for times in range(int(low), int(high) + 1))
        return min(limit, functools.reduce(lambda total, n: min(limit, total + n), powers, 0))
    if op == "SUBPATTERN":
        return _count(value[-1], limit)
    if op == "BRANCH":
        return min(limit, sum(_count(branch, limit) for branch in value[1]))
    if op == "IN":
        return _count_class(value)
    return NUM_CHARACTERS if op in ("ANY", "NOT_LITERAL") else 1


def _count_class(items: Any) -> int:
    count = 0
    for op, value in items:
        name = str(op)
        if name == "NEGATE":
            return NUM_CHARACTERS
        if name == "RANGE":
            count += value[1] - value[0] + 1
        elif name == "CATEGORY":
            count += 10 if str(value) == "CATEGORY_DIGIT" else 63
        else:
            count += 1
    return count
