r"""Whether an answer is right: read as people write answers, and compared as what it is.

A text is read as one of a few kinds: a quantity (a value with its unit), several values (a list, tuple, interval, set),
words, a choice of a multiple-choice question, a ratio, a time or date, a relation. Only what is none of the plain
ones goes to math-verify, which parses the LaTeX and compares expressions.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar

from losslens.problems import Problem, Verdict
from losslens.problems.answer_text import DOLLAR, IN_TEXT, final_answers, without_markup
from losslens.problems.quantities import (
    DEGREE,
    PERCENT,
    RADIAN,
    Number,
    Unit,
    number,
    number_in_words,
    same_number,
    unit,
    without_unit,
)

_LONGEST_ANSWER = 20_000  # characters that are looked at
_LONGEST_EXPRESSION = 1500  # characters; the LaTeX parser goes on for minutes with what is longer
_LONGEST_PLAIN = 200
_WORDS_OF_AN_ANSWER = 8  # a reference of more words is prose, which nobody repeats word by word
_WORDS_OF_A_GUESS = 3  # so many words at the end of a text that announces no answer are taken for one


class MathVerify:
    r"""The verifier of problems whose answer is a number, a quantity, an expression, a choice, or a few words.

    Of a completion counts what stands after its last `</think>`: in the last `<answer>…</answer>` where there is one,
    else in the last `\boxed{…}` with something in it, after `####`, after “the answer is”, or at its end. What is equal
    to what stands in docs/data.md (“Checking answers”).
    """

    needs_network: ClassVar[bool] = False

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """See `Verifier`."""
        reference = read_reference(problem.answer)
        in_words = isinstance(reference, (Words, Choice, Several))
        explicit, places = final_answers(completion)
        for wordings in places:
            readings = [read(text) for text in wordings]
            for text, reading in zip(wordings, readings, strict=True):
                if same(reference, reading):
                    return Verdict(_shown(text), True)
            if any(_is_an_answer(reading, explicit or in_words) for reading in readings):
                return Verdict(_shown(wordings[0]), False)
        return Verdict(_shown(places[0][0]) if explicit else None, False)

    @staticmethod
    def reads(answer: str) -> bool:
        """Whether a reference can be read, so that some completion could be right."""
        return _is_readable(read_reference(answer))

    @staticmethod
    def reads_plainly(answer: str) -> bool:
        """Whether a reference is read at once, with nothing in it that the LaTeX parser is needed for."""
        return len(answer) <= _LONGEST_PLAIN and _is_plain(read_reference(answer))


@dataclass(frozen=True)
class ReadsReference:
    """Finds out, in the process that checks answers, whether a problem's reference can be read."""

    needs_network: ClassVar[bool] = False

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """See `Verifier`; right means that it can."""
        return Verdict(None, MathVerify.reads(problem.answer))


def _shown(text: str) -> str:
    text = without_markup(text)
    return " ".join(text.replace(DOLLAR, "$").split())[:200]


@dataclass(frozen=True)
class Reading:
    """An answer as it was read.

    Attributes:
        text: Its wording, without markup.
        name: What it is the value of, in `x = 5`.
    """

    text: str
    name: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Quantity(Reading):
    """A value with the unit after it.

    Attributes:
        value: The number; None for an expression, to be parsed from `latex`.
        latex: The value's wording.
        unit: Its unit, where it is known; what else is counted (`72 clips`) tells nothing.
    """

    value: Number | None = None
    latex: str = ""
    unit: Unit | None = None


@dataclass(frozen=True)
class Words(Reading):
    """Text that is no mathematics."""


@dataclass(frozen=True)
class Choice(Reading):
    """A choice of a multiple-choice question, with what it says where that is repeated."""

    letter: str = ""
    content: Reading | None = None


@dataclass(frozen=True)
class Several(Reading):
    """Values in brackets, or in a row without (`brackets` is empty)."""

    items: tuple[Reading, ...] = ()
    brackets: str = ""


@dataclass(frozen=True)
class Ratio(Reading):
    """`3:2`."""

    parts: tuple[Fraction, ...] = ()


@dataclass(frozen=True)
class Exact(Reading):
    """A time of day, a date, a number in another base: equal or not."""

    value: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Relation(Reading):
    """An equation or inequality."""


def read_reference(text: str) -> Reading:
    r"""Reads a reference answer; of a worked solution, what stands in its last box or after `####`."""
    if "####" in text or "\\boxed" in text or "\\fbox" in text or "<answer>" in text:
        for wordings in final_answers(text)[1]:
            return read(wordings[-1])
    return read(text)


def read(text: str) -> Reading:
    """Reads an answer."""
    text = " ".join(without_markup(text[: 2 * _LONGEST_ANSWER]).split())
    if len(text) > _LONGEST_ANSWER:
        return Words(text[:_LONGEST_ANSWER])
    return _read(text, 0)


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
    if depth < 8:
        for splitter in (_equation, _several):
            if found := splitter(text, depth):
                return found
    if re.search(r"[<>]|\\(?:le|ge|leq|geq|lt|gt|ne|neq|leqslant|geqslant)\b", text):
        return Relation(text)
    if _LETTERS.fullmatch(simple) and "\\" not in _as_latex(simple) and not _A_MINUS.search(simple):
        return Words(simple)
    rest, known, _ = without_unit(text)
    if known == DEGREE and _OF_AN_ANGLE.search(rest):  # the angle's, not the value's
        rest, known = text, None
    return Quantity(text, value=number(rest), latex=rest, unit=known)


_OF_AN_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
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
    """`2 hours 30 minutes`: the sum, in the first unit."""
    parts = re.findall(r"(\d[\d.,/]*)\s*([A-Za-z]+)\.?", text)
    if len(parts) < 2 or re.sub(r"(\d[\d.,/]*)\s*([A-Za-z]+)\.?|\band\b|[\s,]", "", text):
        return None
    values = [number(value) for value, _ in parts]
    units = [unit(name) for _, name in parts]
    first = units[0]
    if first is None:
        return None
    total = Fraction(0)
    for value, each in zip(values, units, strict=True):
        if value is None or each is None or each.base != first.base or each.factor > first.factor:
            return None
        total += value.value * each.factor / first.factor
    return Quantity(text, value=Number(total), latex=text, unit=first) if len(set(units)) == len(units) else None


_NAME = re.compile(
    r"(?:\\(?:text|angle|triangle|overline|overrightarrow|vec|mathbb|mathcal|hat|bar|operatorname)\b\s*)*"
    r"(?:\{[^{}=]*\}|\\?[A-Za-zα-ω]+|[A-Za-z][\w' ]*)(?:_(?:\{[^{}]*\}|\w))?(?:\s*\([^()=]*\))?(?:\s+[A-Za-z]+)*'?"
)


def _equation(text: str, depth: int) -> Reading | None:
    """`x = 5` as 5 with a name; of a chain, its last part; another equation as a relation."""
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
    """A text cut at a separator that stands in no bracket."""
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
    """Whether the bracket that a text begins with is closed by its last sign."""
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
    r"""Mathematics as it is typed (`sqrt(2)/2`, `x**2`, `pi`, `>=`) in LaTeX."""
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
    for place in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def same(a: Reading, b: Reading) -> bool:
    """Whether the answer `b` is the reference `a`."""
    if a.name and b.name and a.name != b.name and _is_symbol(a.name) and _is_symbol(b.name):
        return a.text != b.text and _verified(f"{a.name}={a.text}", f"{b.name}={b.text}")
    if a.text == b.text and a.text:
        return True
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Relation) and other.name:
            return _verified(one.text, f"{other.name}={other.text}")
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Several) and one.brackets == "≈":
            exact = [item for item in one.items if same(item, other) or same(other, item)]
            return bool(exact)
        if isinstance(one, Choice) and one.content is not None and not isinstance(other, Choice):
            return same(one.content, other)
    if isinstance(a, Choice) and isinstance(b, Choice):
        return a.letter == b.letter
    if isinstance(a, Words) and isinstance(b, Words):
        return bool(_said(a.text)) and _said(a.text) == _said(b.text)
    if isinstance(a, Exact) and isinstance(b, Exact):
        return _same_exactly(a.value, b.value)
    ratios = [_ratio(a), _ratio(b)]
    if isinstance(a, (Ratio, Exact)) or isinstance(b, (Ratio, Exact)):
        return _same_base(a, b) or (None not in ratios and _proportional(ratios[0] or (), ratios[1] or ()))
    if isinstance(a, Quantity) and isinstance(b, Quantity):
        return _same_quantity(a, b)
    if isinstance(a, Several) and isinstance(b, Several):
        return _same_several(a, b) or ("∪" in (a.brackets, b.brackets) and _verified(a.text, b.text))
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Words) and isinstance(other, Several) and not other.brackets:
            return _said(one.text) == "".join(_said(item.text) for item in other.items).casefold()
        if isinstance(one, Words) and isinstance(other, Quantity):
            return _alike(one, other) or (len(one.text) < 4 and _verified(a.text, b.text))
        if isinstance(one, Several) and isinstance(other, Quantity) and not one.brackets and _as_list(other):
            return _same_several(one, Several(other.text, items=_as_list(other)))
    if isinstance(a, Words) or isinstance(b, Words):
        return _alike(a, b)
    return _verified(a.text, b.text)


def _alike(a: Reading, b: Reading) -> bool:
    """Whether two texts of which one is words say the same, and no operator makes them mathematics."""
    return _said(a.text) == _said(b.text) and not any(re.search(r"[-+*/^!=<>\d]", one.text) for one in (a, b))


def _is_symbol(name: str) -> bool:
    return bool(re.fullmatch(r"\\?[A-Za-z](?:_?\w)?|\\[a-z]+", name))


_ARTICLES = re.compile(r"^(?:(?:to|in|on|at) )?(?:the|a|an) ")
_SAID_ALIKE = {
    **dict.fromkeys(
        (r"\emptyset", r"\varnothing", "no solutions", "no real solution", "no real solutions", "there is no solution",
         "there are no solutions", "no solution exists", "no such solution", "empty set"),
        "no solution",
    ),
    "dne": "does not exist",
    "doesn't exist": "does not exist",
    "all reals": "all real numbers",
    r"\mathbb{r}": "all real numbers",
}  # fmt: skip


def _said(text: str) -> str:
    """Words as they are compared: no case, no punctuation, no article."""
    text = IN_TEXT.sub(r"\1", text)
    letter = text if len(text) == 1 else text.casefold()
    plain = " ".join(re.sub(r"[-\"'.,!?:()]", " ", letter).split()) if "\\" not in letter else letter.strip()
    plain = _ARTICLES.sub("", plain)
    return _SAID_ALIKE.get(plain, plain)


def _same_exactly(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    if a[0] == b[0] == "date" and len(a) == len(b) == 4 and 0 in (a[1], b[1]):
        return a[2:] == b[2:]  # one without the year
    return a == b


def _same_base(a: Reading, b: Reading) -> bool:
    """Whether an answer leaves out the base of its reference (`2516` for `2516_8`), or says that it is ten."""
    if isinstance(a, Exact) and a.value[0] == "base" and isinstance(b, Quantity):
        return b.text.lstrip("0") == a.value[1]
    if isinstance(b, Exact) and b.value[0] == "base" and isinstance(a, Quantity):
        return b.value[2] in ("10", "ten") and a.text.lstrip("0") == b.value[1]
    return False


def _ratio(reading: Reading) -> tuple[Fraction, ...] | None:
    if isinstance(reading, Ratio):
        return reading.parts
    if isinstance(reading, Exact) and reading.value[0] == "time":
        match = re.fullmatch(r"(\d+):(\d+)(?::(\d+))?", reading.text)
        return tuple(Fraction(part) for part in match.groups() if part) if match else None
    if isinstance(reading, Quantity) and reading.value is not None and reading.unit is None:
        return (reading.value.value, Fraction(1))
    return None


def _proportional(a: Sequence[Fraction], b: Sequence[Fraction]) -> bool:
    if len(a) != len(b) or not any(a) or not any(b):
        return False
    return all(a[i] * b[j] == a[j] * b[i] for i in range(len(a)) for j in range(i))


def _same_several(a: Several, b: Several) -> bool:
    if len(a.items) != len(b.items):
        return False
    kinds = {a.brackets, b.brackets}
    names = [[item.name for item in one.items] for one in (a, b)]
    if all(names[0]) and sorted(names[0]) == sorted(names[1]) and len(set(names[0])) == len(names[0]):
        by_name = {item.name: item for item in b.items}  # y = 2, x = 1
        return all(same(item, by_name[item.name]) for item in a.items)
    if "{}" in kinds and kinds - {"{}", ""}:
        return False
    if kinds <= {"{}", "", "∪"}:
        left = list(b.items)
        for item in a.items:
            match = next((other for other in left if same(item, other)), None)
            if match is None:
                return False
            left.remove(match)
        return True
    if len(kinds - {""}) > 1 and (len(a.items) == 2 or kinds != {"()", "[]"}):
        return False  # intervals with other ends
    return all(same(one, other) for one, other in zip(a.items, b.items, strict=True))


def _as_list(reading: Quantity) -> tuple[Reading, ...]:
    """`100,200` can be two numbers."""
    if not re.fullmatch(r"-?\d{1,3}(?:,\d{3})+", reading.text):
        return ()
    return tuple(_read(part, 8) for part in reading.text.split(","))


def _same_quantity(a: Quantity, b: Quantity) -> bool:
    units = (a.unit, b.unit)
    if a.unit is not None and b.unit is not None:
        if a.unit.base == b.unit.base:
            return _same_value(a, a.unit.factor, b, b.unit.factor)
        if {a.unit.base, b.unit.base} == {DEGREE.base, RADIAN.base}:
            return _same_angle(a, b)
        return False
    if _same_value(a, Fraction(1), b, Fraction(1)):
        return True
    if any(one is not None and one.base == DEGREE.base for one in units):
        return _same_angle(a, b)
    percents = [one is not None and one.base == PERCENT.base for one in units]
    if any(percents):
        shares = [Fraction(1, 100) if percent else Fraction(1) for percent in percents]
        return _same_value(a, shares[0], b, shares[1])
    return False


def _same_angle(a: Quantity, b: Quantity) -> bool:
    import sympy

    values = [_expression(one) for one in (a, b)]
    if None in values:
        return False
    turned = [
        value * sympy.pi / 180 if one.unit is not None and one.unit.base == DEGREE.base else value
        for value, one in zip(values, (a, b), strict=True)
    ]
    return bool(_same_expression(turned[0], turned[1]))


def _same_value(a: Quantity, times_a: Fraction, b: Quantity, times_b: Fraction) -> bool:
    if a.value is not None and b.value is not None:
        return same_number(_scaled(a.value, times_a), _scaled(b.value, times_b))
    import sympy

    left, right = _expression(a), _expression(b)
    if left is None or right is None:
        return False
    for value, other in ((a.value, right), (b.value, left)):
        if value is not None and (near := _near(value, other)) is not None:
            return (
                near if times_a == times_b == 1 else _same_expression(left * _exact(times_a), right * _exact(times_b))
            )
    if times_a == times_b:
        return _same_expression(left, right)
    if not all(isinstance(value, sympy.Expr) for value in (left, right)):
        return False
    return _same_expression(left * _exact(times_a), right * _exact(times_b))


def _scaled(value: Number, factor: Fraction) -> Number:
    return value._replace(value=value.value * factor, ulp=value.ulp and value.ulp * factor)


def _exact(value: Fraction) -> Any:
    import sympy

    return sympy.Rational(value.numerator, value.denominator)


def _expression(quantity: Quantity) -> Any:
    """The value as sympy has it; None when it cannot be parsed."""
    return _exact(quantity.value.value) if quantity.value is not None else parsed(quantity.latex)


def _near(value: Number, expression: Any) -> bool | None:
    """Whether a written number is an expression; None when the expression is no number."""
    other = _evaluated(expression)
    if other is None:
        return None
    if not other.is_real:
        return False
    exactly = Fraction(str(other)) if other.is_Float else Fraction(int(other.p), int(other.q))
    return same_number(value, Number(exactly, abs(exactly) / 10**25, 0))


def _evaluated(expression: Any) -> Any:
    """A number of thirty digits; None for what is none."""
    import sympy

    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return None
    number = sympy.N(expression.doit(), 30)
    if not number.is_number or number.is_finite is False or not number.is_finite:
        return None
    real, imaginary = number.as_real_imag()
    return sympy.Float(real, 30) if abs(imaginary) < 1e-25 * max(1, abs(real)) else number


def _same_expression(a: Any, b: Any) -> bool:
    import sympy
    from math_verify import verify

    numbers = _evaluated(a), _evaluated(b)
    if numbers[0] is not None and numbers[1] is not None:
        rough = any(isinstance(one, sympy.Expr) and one.has(sympy.Float) for one in (a, b))
        difference = abs(numbers[0] - numbers[1])
        size = max(abs(numbers[0]), abs(numbers[1]))
        return bool(difference <= (1e-7 if rough else 1e-15) * size or size < 1e-25)
    return bool(verify([a], [b], float_rounding=12, allow_set_relation_comp=True, timeout_seconds=None))


def _verified(a: str, b: str) -> bool:
    left, right = parsed(a), parsed(b)
    return left is not None and right is not None and _same_expression(left, right)


_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*(?:\^\s*\{?\s*\\circ\s*\}?|°|\\degree\b)")


@lru_cache(maxsize=1024)
def parsed(latex: str) -> Any:
    """What math-verify's parser makes of LaTeX; None when that is nothing, or the text is prose."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
    from math_verify.parser import parse_latex_cached
    from sympy import Basic, I, MatrixBase

    if not latex.strip() or _is_prose(latex):
        return None
    if len(latex) > _LONGEST_EXPRESSION:
        raise ValueError(f"an expression of {len(latex)} characters, of at most {_LONGEST_EXPRESSION}")
    # The time limit is `verification.py`'s; math-verify's own is a signal, which a long product ignores.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # Units are parted from values before: math-verify would take the `t` of `\frac{1}{2}t` for one.
    latex = _DEGREES.sub(r"(\1 \\cdot \\frac{\\pi}{180})", latex) if _OF_AN_ANGLE.search(latex) else latex
    latex = re.sub(r"(?<=[\d)}])i(?![A-Za-z])", " i", latex)  # it takes the `i` of `3i` for a variable
    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")
    try:
        found = parse_latex_cached(normalize_latex(latex.replace("°", r"^{\circ}"), config))
    except (RecursionError, MemoryError):
        raise
    except Exception:  # the parser's own, of many kinds
        return None
    if not isinstance(found, (Basic, MatrixBase)):
        return None
    imaginary = [symbol for symbol in found.free_symbols if symbol.name == "i"]
    return found.subs(imaginary[0], I) if imaginary else found


def _is_prose(latex: str) -> bool:
    bare = re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+\*?", " ", IN_TEXT.sub(r" \1 ", latex))
    runs = [len(run) for run in re.findall(r"[^\W\d_]+", bare)]
    return any(run > 3 for run in runs) or sum(run > 1 for run in runs) > 1


def _is_readable(reading: Reading) -> bool:
    if isinstance(reading, Words):
        return 0 < len(reading.text.split()) <= _WORDS_OF_AN_ANSWER and bool(_said(reading.text))
    if isinstance(reading, Choice):
        return reading.content is None or _is_readable(reading.content)
    if isinstance(reading, Several):
        return all(_is_readable(item) for item in reading.items)
    if isinstance(reading, Quantity) and reading.value is None:
        return parsed(reading.latex) is not None
    if isinstance(reading, Relation):
        return parsed(reading.text) is not None
    return True


def _is_plain(reading: Reading) -> bool:
    if isinstance(reading, Several):
        return all(_is_plain(item) for item in reading.items)
    if isinstance(reading, Quantity):
        return reading.value is not None
    return not isinstance(reading, Relation) and _is_readable(reading)


def _is_an_answer(reading: Reading, in_words: bool) -> bool:
    """Whether a text that may be the answer is one (words only where they can be), and no other place is looked at."""
    if isinstance(reading, Words):
        return in_words and len(reading.text.split()) <= _WORDS_OF_A_GUESS
    return _is_readable(reading)
