"""Looks at the text of regular expressions and grammars before a library reads them.

What would be read otherwise than its author meant is refused by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from nanovllm.errors import ArgumentError, shown

EBNF_RULE = re.compile(r"^[^\S\n]*[\w-]+\s*::=", re.MULTILINE)
EBNF_COMMENT = re.compile(r"#[^\n]*")
EBNF_BLANKS = re.compile(r"(?:\s|#[^\n]*)+")
# Pieces of a grammar in Lark's form; the rest has no string, regex, token or comment in it. One
# that is not closed is a piece as well, so that reading stays linear.
LARK_PIECES = re.compile(
    r'"(?:\\.|[^"\\\n])*(?:"i?)?|/(?![/*])(?:\\.|[^/\\\n])+(?P<end>/)?|<[^>\n]*>?|(?://|#)[^\n]*',
    re.DOTALL,
)
LARK_REFUSED = {
    re.compile(r"%json\b"): "%json: give the schema as json",
    re.compile(r"%lark\b"): "%lark",
    re.compile(r"(?<!\w)@\w"): "@, another grammar",
    re.compile(r"\btemperature\s*="): "temperature=",
    re.compile(r"\bstop\w*\s*="): "stop=: write suffix= or lazy",
}
COUNT = re.compile(r"(?<!\\)\{\d+(,\d*)?\}\Z")
ESCAPE = r"\\(?:x\{\w*\}|u\{\w*\}|x\w\w|u\w{4}|U\w{8}|.)"
# Classes, and escapes outside of them. A class that is not closed is one as well.
REGEX_CLASSES = re.compile(rf"\[\^?\]?(?:\\.|[^\]\\])*\]?|{ESCAPE}|\x00", re.DOTALL)
CLASS_ITEM = re.compile(rf"(?P<item>{ESCAPE}|[^\\])(?P<range>-(?!\]))?", re.DOTALL)
NUL = re.compile(r"\x00|\\(?:x00|u0000|U0{8}|[xuU]\{0+\})")
CONTROL_CLASS = re.compile(
    r"\\P|\\p\{\^|\\p[Cc]|\\p\{[^}]*[=:]|(?i:\\p\{[ _-]*(?:c|cc|other|control|cntrl)[ _-]*\})"
)
HEX_LENGTHS = {"x": 2, "u": 4, "U": 8}


def check_regex(pattern: str, name: str, has_sets: bool = True) -> None:
    """Refuse what llguidance (Rust's syntax) and other dialects both read, but in two ways.

    Args:
        name: of the pattern, for the message.
        has_sets: whether `&&`, `--`, `~~` and `[` inside of `[...]` may mean sets, as in Rust.
    """
    set_start, previous, position = -1, "", 0  # previous: of what may be repeated
    while position < len(pattern):
        char = pattern[position]
        if char == "\\":
            position += 2
            previous = "\\"
            continue
        if set_start >= 0:
            pair = pattern[position : position + 2]
            if char == "]" and position > set_start:
                set_start = -1
            elif char == "[" and not has_sets:
                raise _unclear(name, pattern, "a '[' inside of [...]: write \\[ for it")
            elif pair in ("&&", "--", "~~") and not has_sets:
                raise _unclear(name, pattern, f"{pair!r} inside of [...]: write \\{pair[0]}")
        elif char == "[":
            set_start = position + 1 + pattern.startswith("^", position + 1)
        elif char == "+" and (
            previous in ("*", "+", "?")
            or (previous == "}" and COUNT.search(pattern, max(0, position - 30), position))
        ):
            raise _unclear(name, pattern, "a possessive quantifier: leave its last '+' out")
        previous = char if set_start < 0 else ""
        position += 1


def quotable_regex(pattern: str, name: str) -> str:
    """`pattern` for the characters of a JSON string, which hold no NUL.

    llguidance lets a class that has all 32 control characters match `"` and the backslash too. None
    has, if none has NUL.
    """
    if CONTROL_CLASS.search(pattern):
        raise _unclear(name, pattern, "a class of control characters: write a range of them")
    pieces, position = [], 0
    for piece in REGEX_CLASSES.finditer(pattern):
        pieces.append(pattern[position : piece.start()])
        position = piece.end()
        text = piece[0]
        if text.startswith("[^"):
            first = "\\" if text[2:3] in ("]", "-") else ""  # a literal at the start only
            text = f"[^\\x00{first}{text[2:]}"
        elif text.startswith("["):
            text = "".join(map(_without_nul, CLASS_ITEM.finditer(text)))
        if NUL.fullmatch(text):
            raise _unclear(name, pattern, "NUL, which no JSON string holds")
        pieces.append(text)
    pieces.append(pattern[position:])
    return "".join(pieces)


def _without_nul(item: re.Match[str]) -> str:
    """An item of a class, that of a range from NUL as from the next character."""
    if not NUL.fullmatch(item["item"]):
        return item[0]
    return "\\x01-" if item["range"] else ""


def check_lark(grammar: str) -> None:
    """Refuse llguidance's extensions of Lark that are not enforced or escape the other checks."""
    code = []
    end = 0
    for piece in LARK_PIECES.finditer(grammar):
        code.append(grammar[end : piece.start()])
        end = piece.end()
        if piece["end"]:
            check_regex(piece[0][1:-1], "grammar")
    code.append(grammar[end:])
    rest = " ".join(code)
    for pattern, message in LARK_REFUSED.items():
        if pattern.search(rest):
            raise ArgumentError(f"structured outputs, grammar: nanovllm does not take {message}")


def plain_ebnf(grammar: str) -> str:
    """An EBNF grammar in the part of the notation that llguidance's converter reads rightly.

    Escapes become the characters they stand for, `.` any character at all, comments nothing. A line
    that begins with `|` belongs to the one before it.

    Raises:
        ArgumentError: an escape, a string or a class is malformed, or a rule is there twice.
    """
    plain = "".join(_ebnf_pieces(grammar))
    rules = Counter(rule[0].rstrip(":= \t\r").strip() for rule in EBNF_RULE.finditer(plain))
    for name, count in rules.items():
        if count > 1:
            raise _wrong_ebnf(f"the rule {shown(name)} is there {count} times")
    return plain


def _ebnf_pieces(grammar: str) -> Iterator[str]:
    position = 0
    while position < len(grammar):
        char = grammar[position]
        if blanks := EBNF_BLANKS.match(grammar, position):
            position = blanks.end()
            goes_on = grammar.startswith("|", position)  # the rule, on the next line
            yield " " if goes_on else EBNF_COMMENT.sub("", blanks[0])
        elif char == '"':
            chars, position = _ebnf_chars(grammar, position + 1, '"')
            yield '"' + "".join(_ebnf_escaped(char, '"\\') for char, _ in chars) + '"'
        elif char == "[":
            chars, position = _ebnf_chars(grammar, position + 1, "]")
            yield _ebnf_class(chars)
        elif char == ".":
            yield "[\\x01-\U0010ffff]"
            position += 1
        else:
            yield char
            position += 1


def _ebnf_chars(grammar: str, position: int, end: str) -> tuple[list[tuple[str, bool]], int]:
    """Characters up to `end`, and whether each was escaped; and the place after `end`."""
    start, chars = position, []
    while position < len(grammar) and grammar[position] != end:
        char = grammar[position]
        position += 1
        if char != "\\":
            chars.append((char, False))
            continue
        char = grammar[position : position + 1]
        position += 1
        if char in HEX_LENGTHS:
            digits = grammar[position : position + HEX_LENGTHS[char]]
            position += HEX_LENGTHS[char]
            code = int(digits, 16) if re.fullmatch("[0-9a-fA-F]+", digits) else -1
            if len(digits) != HEX_LENGTHS[char] or not 0 <= code <= 0x10FFFF or _is_lone(code):
                raise _wrong_ebnf(f"\\{char}{digits} is no character")
            chars.append((chr(code), True))
        elif char and char in 'nrt"\\[]':
            chars.append(({"n": "\n", "r": "\r", "t": "\t"}.get(char, char), True))
        else:
            raise _wrong_ebnf(f"\\{char} is no escape")
    if position >= len(grammar):
        raise _wrong_ebnf(f"{shown(grammar[start - 1 : start + 40])} does not end")
    return chars, position + 1


def _ebnf_class(chars: list[tuple[str, bool]]) -> str:
    is_negated = bool(chars) and chars[0] == ("^", False)
    items = chars[is_negated:]
    if not items:
        raise _wrong_ebnf("an empty [] or [^]")
    pieces = []
    index = 0
    while index < len(items):
        char = items[index][0]
        if index + 2 < len(items) and items[index + 1] == ("-", False):
            last = items[index + 2][0]
            if ord(last) < ord(char):
                raise _wrong_ebnf(f"the range {char!r} to {last!r} is empty")
            pieces.append(f"{_class_char(char)}-{_class_char(last)}")
            index += 3
        else:
            pieces.append(_class_char(char))
            index += 1
    return f"[{'^' if is_negated else ''}{''.join(pieces)}]"


def _class_char(char: str) -> str:
    """As llguidance's converter hands it on to Rust's regex syntax unchanged."""
    if char.isalnum() or ord(char) > 0x7F:
        return char
    return _ebnf_escaped(char, "\\[]") if char in "\n\r\t\\[]" else f"\\x{ord(char):02x}"


def _ebnf_escaped(char: str, special: str) -> str:
    if char in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[char]
    if char in special:
        return f"\\{char}"
    return f"\\x{ord(char):02x}" if char < " " or char == "\x7f" else char


def _is_lone(code: int) -> bool:
    return 0xD800 <= code <= 0xDFFF


def _wrong_ebnf(message: str) -> ArgumentError:
    return ArgumentError(f"structured outputs, grammar: {message}")


def _unclear(name: str, pattern: str, what: str) -> ArgumentError:
    return ArgumentError(
        f"structured outputs, {name}: regex dialects disagree about {what}; got {shown(pattern)}"
    )
