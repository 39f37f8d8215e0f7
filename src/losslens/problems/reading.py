r"""Parsing of answers into kinds.

The kinds are: a quantity (a value with its unit), several values (a list, tuple, interval or set), words, a choice of a
multiple-choice question, a ratio, a time or date, and a relation. Expressions remain LaTeX.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from losslens.problems.answer_text import DOLLAR, IN_TEXT, without_markup
from losslens.problems.final_answer import final_answers
from losslens.problems.quantities import DEGREE, Number, Unit, number, number_in_words, unit, without_unit

_LONGEST_ANSWER = 20_000  # characters; the rest is ignored
_MAX_DEPTH = 8  # of nested lists


@dataclass(frozen=True)
class Reading:
    """A parsed answer.

    Attributes:
        text: Its text without markup.
        name: The name before an equals sign: `x` in `x = 5`.
    """

    text: str
    name: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Quantity(Reading):
    """A value and its unit.

    Attributes:
        value: The number; None for an expression, which is parsed from `latex`.
        latex: Text of the value.
        unit: Its unit if known; other words for what is counted (`72 clips`) are ignored.
    """

    value: Number | None = None
    latex: str = ""
    unit: Unit | None = None


@dataclass(frozen=True)
class Words(Reading):
    """Text that is not mathematics."""


@dataclass(frozen=True)
class Choice(Reading):
    """A choice of a multiple-choice question, with its content if that is given, too."""

    letter: str = ""
    content: Reading | None = None


@dataclass(frozen=True)
class Several(Reading):
    """Several values in brackets, or without (then `brackets` is empty)."""

    items: tuple[Reading, ...] = ()
    brackets: str = ""


@dataclass(frozen=True)
class Ratio(Reading):
    """A ratio such as `3:2`."""

    parts: tuple[Fraction, ...] = ()


@dataclass(frozen=True)
class Exact(Reading):
    """A time of day, a date, or a number in another base, compared for equality."""

    value: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Relation(Reading):
    """An equation or inequality."""


def read_reference(text: str) -> Reading:
    r"""Parses a reference answer; in a worked solution, the content of its last box or the text after `####`."""
    if "####" in text or "\\boxed" in text or "\\fbox" in text or "<answer>" in text:
        for wordings in final_answers(text)[1]:
            return read(wordings[-1])
    return read(text)


def read(text: str) -> Reading:
    """Parses an answer."""
    text = " ".join(without_markup(text[: 2 * _LONGEST_ANSWER]).split())
    if len(text) > _LONGEST_ANSWER:
        return Words(text[:_LONGEST_ANSWER])
    return _read(text, 0)


def read_one(text: str) -> Reading:
    """Parses one of several answers, which is not split further."""
    return _read(text, _MAX_DEPTH)


def _read(text: str, depth: int) -> Reading:
    text = text.strip()
    simple = IN_TEXT.sub(r"\1", text).strip()
    if choice := _choice(simple, depth):
        return choice
    spoken = number_in_words(simple)
    if spoken != simple:
        simple = text = spoken
    for reader in (_calendar, _clock_or_ratio, _in_a_base):
        if found := reader(simple):
            return found
    if value := number(simple):
        return Quantity(text, value=value, latex=simple)
    rest, known, noun = without_unit(text)
    if (known or noun) and (value := number(rest)):
        return Quantity(text, value=value, latex=rest, unit=known)
    if total := _compound(simple):
        return total
    text = _as_latex(text)
    if depth < _MAX_DEPTH:
        for splitter in (_equation, _several):
            if found := splitter(text, depth):
                return found
    if re.search(r"[<>]|\\(?:le|ge|leq|geq|lt|gt|ne|neq|leqslant|geqslant)\b", text):
        return Relation(text)
    if _LETTERS.fullmatch(simple) and "\\" not in _as_latex(simple) and not _A_MINUS.search(simple):
        return Words(simple)
    rest, known, _ = without_unit(text)
    if known == DEGREE and OF_AN_ANGLE.search(rest):  # the unit of the angle, not of the value
        rest, known = text, None
    return Quantity(text, value=number(rest), latex=rest, unit=known)


OF_AN_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_LETTERS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '.,\-&/?:()\"]|(?<=[^\W\d_]{3})!)*")
_A_MINUS = re.compile(r"(?<![^\W\d_])[^\W\d_]?\s*[-/]\s*[^\W\d_](?![^\W\d_])|\s[-/]\s")
_CHOICE = re.compile(
    r"\(\s*(?P<a>[A-Ja-j])\s*\)|(?P<b>[A-Ja-j])\s*[.):]?|\[(?P<c>[A-J])\]"
    r"|(?:\(\s*(?P<d>[A-J])\s*\)|(?P<e>[A-J])\s*[.):])\s*(?P<content>(?!and\b|or\b)[^\s,;].*)"
)


def _choice(text: str, depth: int) -> Reading | None:
    match = _CHOICE.fullmatch(text)
    if match is None or depth > 1:
        return None
    letter = next(match[name] for name in "abcde" if match[name])
    content = _read(match["content"].rstrip("."), depth + 2) if match["content"] else None
    return Choice(text, letter=letter.upper(), content=content)


_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_MONTH = "|".join(f"{name[:3]}(?:{name[3:]})?" if len(name) > 3 else name for name in _MONTHS) + "|sept"
_DATES = [
    re.compile(rf"(?P<month>{_MONTH})\.?\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:\s*,?\s*(?P<year>\d{{4}}))?", re.I),
    re.compile(
        rf"(?:the\s+)?(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<month>{_MONTH})\.?(?:,?\s*(?P<year>\d{{4}}))?",
        re.I,
    ),
    re.compile(rf"(?P<month>{_MONTH})\.?,?\s+(?P<year>\d{{4}})", re.I),
    re.compile(r"(?P<year>\d{4})-(?P<number>\d{2})-(?P<day>\d{2})"),
]
_SLASHED = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})")


def _calendar(text: str) -> Reading | None:
    text = re.sub(r"^(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+|on\s+)", "", text, flags=re.I)
    if match := _SLASHED.fullmatch(text):
        return Exact(text, value=("date as written", *(int(part) for part in match.groups())))
    for pattern in _DATES:
        if match := pattern.fullmatch(text):
            parts = match.groupdict()
            month = int(parts["number"]) if parts.get("number") else _month(parts["month"])
            return Exact(text, value=("date", int(parts.get("year") or 0), month, int(parts.get("day") or 0)))
    return None


def _month(name: str) -> int:
    return next(n for n, month in enumerate(_MONTHS, 1) if month.startswith(name[:3].lower()))


_TIME = re.compile(
    r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*(a\.?m\.?|p\.?m\.?|noon|midnight)?|(\d{1,2})\s*(a\.?m\.?|p\.?m\.?)", re.I
)
_RATIO = re.compile(r"[\d.,/\s]+(?:(?::|\\colon|\bto\b|\\text\{\s*to\s*\})[\d.,/\s]+)+")


def _clock_or_ratio(text: str) -> Reading | None:
    if match := _TIME.fullmatch(text):
        half = (match[4] or match[6] or "").replace(".", "").lower()
        hour, minute, second = int(match[1] or match[5]), int(match[2] or 0), int(match[3] or 0)
        if minute < 60 and hour < 25 and (half or match[2]):
            hour = hour % 12 + 12 * (half == "pm") if half in ("am", "pm") else hour
            return Exact(text, value=("time", hour, minute, second))
    if _RATIO.fullmatch(text):
        parts = [number(part) for part in re.split(r":|\\colon|\bto\b", re.sub(r"\\text\{\s*to\s*\}", "to", text))]
        values = tuple(part.value for part in parts if part is not None)
        if len(values) == len(parts) and any(values):
            return Ratio(text, parts=values)
    return None


def _in_a_base(text: str) -> Reading | None:
    text = re.sub(r"\s+(?:in\s+base\s+(\w+)|\(\s*base\s+(\w+)\s*\))$", lambda m: f"_{m[1] or m[2]}", text)
    match = re.fullmatch(
        r"([0-9A-Fa-f]*\d[0-9A-Fa-f]*)_\{?\s*(?:\\text\{)?\s*(\d{1,2}|two|three|five|eight|ten|sixteen)\s*\}*", text
    )
    return Exact(text, value=("base", match[1].upper().lstrip("0"), match[2])) if match else None


def _compound(text: str) -> Reading | None:
    """Parses `2 hours 30 minutes` as the sum, in the first unit."""
    parts = re.findall(r"(\d[\d.,/]*)\s*([A-Za-z]+)\.?", text)
    if len(parts) < 2 or re.sub(r"(\d[\d.,/]*)\s*([A-Za-z]+)\.?|\band\b|[\s,]", "", text):
        return None
    values = [number(value) for value, _ in parts]
    units = [unit(name) for _, name in parts]
    first = units[0]
    if first is None:
        return None
    total = Fraction(0)
    for value, part in zip(values, units, strict=True):
        if value is None or part is None or part.base != first.base or part.factor > first.factor:
            return None
        total += value.value * part.factor / first.factor
    return Quantity(text, value=Number(total), latex=text, unit=first) if len(set(units)) == len(units) else None


_NAME = re.compile(
    r"(?:\\(?:text|angle|triangle|overline|overrightarrow|vec|mathbb|mathcal|hat|bar|operatorname)\b\s*)*"
    r"(?:\{[^{}=]*\}|\\?[A-Za-zα-ω]+|[A-Za-z][\w' ]*)(?:_(?:\{[^{}]*\}|\w))?(?:\s*\([^()=]*\))?(?:\s+[A-Za-z]+)*'?"
)


def _equation(text: str, depth: int) -> Reading | None:
    """Parses `x = 5` as 5 with a name, a chain of equations as its last part, and other equations as a relation."""
    parts = _split(text, r"(?<![<>!\\:])=(?!=)|\\in\b(?=\s*[\[({\\])")
    about = _split(text, r"\\approx\b|≈")
    if len(parts) == 1 and len(about) == 2 and all(about):
        return Several(text, items=tuple(_read(part, depth + 1) for part in about), brackets="≈")
    if len(parts) == 1 or not parts[-1]:
        return None
    if any(re.search(r"[<>]|\\(?:le|ge|leq|geq|ne|neq)\b", part) for part in parts) or _split(text, _SEPARATOR)[1:]:
        return None
    left = parts[0]
    value = _read(parts[-1], depth + 1)
    if _NAME.fullmatch(left) or not left:
        return _named(value, re.sub(r"\\text\{([^{}]*)\}|\s|[{}]", r"\1", left))
    if not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", left)):  # 2 + 3 = 5
        return value
    return Relation(text)


def _named(reading: Reading, name: str) -> Reading:
    from dataclasses import replace

    return replace(reading, name=reading.name or name)


_OPENING, _CLOSING = "([{", ")]}"


def _split(text: str, separator: str) -> list[str]:
    """Splits a text at a separator outside brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf"\\[{{}}]|\\(?:langle|rangle)\b|[\[\](){{}}]|(?P<cut>{separator})", text):
        sign = match[0].strip("\\") if match["cut"] is None else ""
        if match["cut"] is not None:
            if depth == 0:
                parts.append(text[start : match.start()].strip())
                start = match.end()
        elif sign in ("(", "[", "{", "langle"):
            depth += 1
        else:
            depth = max(0, depth - 1)
    return [*parts, text[start:].strip()]


_BRACKETS = re.compile(
    r"(\\\{|\\lbrace\b|\\langle\b|\\lbrack\b|\(|\[)(.*)(\\\}|\\rbrace\b|\\rangle\b|\\rbrack\b|\)|\])", re.S
)
_ALIASES = {
    "\\{": "{",
    "\\}": "}",
    "\\lbrace": "{",
    "\\rbrace": "}",
    "\\langle": "(",
    "\\rangle": ")",
    "\\lbrack": "[",
    "\\rbrack": "]",
}
_SEPARATOR = r",|;|\band\b|\bor\b|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\\(?:land|lor|wedge|vee)\b"


def _several(text: str, depth: int) -> Reading | None:
    if "\\begin" in text:
        return None
    if "\\pm" in text or "\\mp" in text:
        signs = [text.replace(r"\pm", plus).replace(r"\mp", minus) for plus, minus in ("+-", "-+")]
        both = [re.sub(r"(^|[(,=]\s*)\+\s*", r"\1", sign) for sign in signs]
        return Several(text, items=tuple(_read(one, depth + 1) for one in both))
    unions = _split(text, r"\\cup\b")
    if len(unions) > 1 and all(unions):
        return Several(text, items=tuple(_read(part, depth + 1) for part in unions), brackets="∪")
    match = _BRACKETS.fullmatch(text)
    if match and _closes_at_the_end(text):
        brackets = _ALIASES.get(match[1], match[1]) + _ALIASES.get(match[3], match[3])
        inner = _split(
            match[2], r",(?=\s)|;" if re.search(r",\s", match[2]) and _split(match[2], r",(?=\s)")[1:] else r",|;"
        )
        if len(inner) > 1 and all(inner):
            return Several(text, items=tuple(_read(part, depth + 1) for part in inner), brackets=brackets)
        if brackets in ("()", "{}", "[]") and match[2].strip() and len(inner) == 1:
            return _read(match[2], depth + 1)
        return None
    parts = [part for part in _split(text, _SEPARATOR) if part]
    if len(parts) > 1 and all(len(part.split()) < 6 for part in parts):
        return Several(text, items=tuple(_read(part, depth + 1) for part in parts))
    return None


def _closes_at_the_end(text: str) -> bool:
    """True if the bracket that a text begins with is closed by its last character."""
    depth = 0
    for match in re.finditer(r"\\(?:lbrace|langle|lbrack)\b|\\(?:rbrace|rangle|rbrack)\b|\\?[\[\](){}]", text):
        opens = match[0].lstrip("\\") in ("(", "[", "{", "lbrace", "langle", "lbrack")
        depth += 1 if opens else -1
        if depth == 0:
            return match.end() == len(text)
    return False


_FUNCTIONS = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp)(?![A-Za-z])"
)
_CONSTANTS = re.compile(
    r"(?<![\\A-Za-z])(?:(?P<pi>pi)|(?P<inf>infinity|infty|inf|oo)|(?P<greek>theta|alpha|beta|gamma|lambda|omega|phi))(?![A-Za-z])"
)
_ROOT_CALL = re.compile(r"(?<![A-Za-z])\\?(sqrt|cbrt)\s*\(")


def _as_latex(text: str) -> str:
    r"""Converts typed mathematics (`sqrt(2)/2`, `x**2`, `pi`, `>=`) to LaTeX."""
    text = text.replace("**", "^").replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")
    text = text.replace("+/-", r"\pm ").replace(DOLLAR, "")
    for _ in range(10):
        match = _ROOT_CALL.search(text)
        if match is None:
            break
        end = _closing(text, match.end() - 1)
        root = r"\sqrt[3]{" if match[1] == "cbrt" else r"\sqrt{"
        text = text[: match.start()] + root + text[match.end() : end] + "}" + text[end + 1 :]
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*(?=[\d{])", r"\\sqrt ", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\^\s*(-?\d+)(?![\d}.])", r"^{\1}", text)
    text = re.sub(r"(?<=[\w)}\]])\s*\*\s*(?=[\w({\\-])", r" \\cdot ", text)
    text = _FUNCTIONS.sub(r"\\\1 ", text)
    return _CONSTANTS.sub(
        lambda m: "\\pi " if m["pi"] else "\\infty " if m["inf"] else f"\\{m['greek']} ", text
    ).strip()


def _closing(text: str, at: int) -> int:
    depth = 0
    for index in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)
