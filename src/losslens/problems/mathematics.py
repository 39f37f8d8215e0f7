r"""Verification of mathematical answers: parsed answers (`reading.py`) are compared according to their kind.

Only answers of no simpler kind are passed to math-verify, which parses the LaTeX and compares expressions.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar

from losslens.problems import Problem, Verdict
from losslens.problems.answer_text import DOLLAR, IN_TEXT, without_markup
from losslens.problems.final_answer import final_answers
from losslens.problems.quantities import DEGREE, PERCENT, RADIAN, Number, same_number
from losslens.problems.reading import (
    OF_AN_ANGLE,
    Choice,
    Exact,
    Quantity,
    Ratio,
    Reading,
    Relation,
    Several,
    Words,
    read,
    read_one,
    read_reference,
)

_LONGEST_EXPRESSION = 1500  # characters; the LaTeX parser takes minutes for longer ones
_LONGEST_PLAIN = 200
_MAX_WORDS_OF_REFERENCE = 8  # a longer reference is prose, which no completion repeats verbatim
_MAX_WORDS_OF_ANSWER = 3  # as many words at the end of a text without an announcement may be its answer


class MathVerify:
    r"""The verifier of problems whose answer is a number, a quantity, an expression, a choice, or a few words.

    The answer is taken from the text after the last `</think>`: from the last `<answer>…</answer>` if there is one,
    else from the last non-empty `\boxed{…}`, after `####`, after “the answer is”, or from the end.
    docs/reference/answers.md describes which answers are equal.
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
        """True if a reference can be parsed, so that a completion could be correct."""
        return _is_readable(read_reference(answer))

    @staticmethod
    def reads_plainly(answer: str) -> bool:
        """True if a reference can be parsed without the LaTeX parser, and hence at once."""
        return len(answer) <= _LONGEST_PLAIN and _is_plain(read_reference(answer))


@dataclass(frozen=True)
class ReadsReference:
    """Tests in the process that verifies answers if a problem's reference can be parsed."""

    needs_network: ClassVar[bool] = False

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """See `Verifier`; correct means that the reference can be parsed."""
        return Verdict(None, MathVerify.reads(problem.answer))


def _shown(text: str) -> str:
    text = without_markup(text)
    return " ".join(text.replace(DOLLAR, "$").split())[:200]


def same(a: Reading, b: Reading) -> bool:
    """True if the answer `b` equals the reference `a`."""
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
        return bool(_normalised(a.text)) and _normalised(a.text) == _normalised(b.text)
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
            return _normalised(one.text) == "".join(_normalised(item.text) for item in other.items).casefold()
        if isinstance(one, Words) and isinstance(other, Quantity):
            return _alike(one, other) or (len(one.text) < 4 and _verified(a.text, b.text))
        if isinstance(one, Several) and isinstance(other, Quantity) and not one.brackets and _as_list(other):
            return _same_several(one, Several(other.text, items=_as_list(other)))
    if isinstance(a, Words) or isinstance(b, Words):
        return _alike(a, b)
    return _verified(a.text, b.text)


def _alike(a: Reading, b: Reading) -> bool:
    """True if two texts, of which one is words, are the same and contain no mathematical operator."""
    return _normalised(a.text) == _normalised(b.text) and not any(
        re.search(r"[-+*/^!=<>\d]", one.text) for one in (a, b)
    )


def _is_symbol(name: str) -> bool:
    return bool(re.fullmatch(r"\\?[A-Za-z](?:_?\w)?|\\[a-z]+", name))


_ARTICLES = re.compile(r"^(?:(?:to|in|on|at) )?(?:the|a|an) ")
_SYNONYMS = {
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


def _normalised(text: str) -> str:
    """Normalises words for comparison: removes case, punctuation and articles; replaces synonyms."""
    text = IN_TEXT.sub(r"\1", text)
    letter = text if len(text) == 1 else text.casefold()
    plain = " ".join(re.sub(r"[-\"'.,!?:()]", " ", letter).split()) if "\\" not in letter else letter.strip()
    plain = _ARTICLES.sub("", plain)
    return _SYNONYMS.get(plain, plain)


def _same_exactly(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    if a[0] == b[0] == "date" and len(a) == len(b) == 4 and 0 in (a[1], b[1]):
        return a[2:] == b[2:]  # one date has no year
    return a == b


def _same_base(a: Reading, b: Reading) -> bool:
    """True if one number omits the base of the other (`2516` for `2516_8`), or the base is ten."""
    if isinstance(a, Exact) and a.value[0] == "base" and isinstance(b, Quantity):
        return bool(b.text.lstrip("0") == a.value[1])
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
        return False  # intervals of different types
    return all(same(one, other) for one, other in zip(a.items, b.items, strict=True))


def _as_list(reading: Quantity) -> tuple[Reading, ...]:
    """Reads a number such as `100,200` as two numbers."""
    if not re.fullmatch(r"-?\d{1,3}(?:,\d{3})+", reading.text):
        return ()
    return tuple(read_one(part) for part in reading.text.split(","))


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
    """Converts the value to sympy; None if it cannot be parsed."""
    return _exact(quantity.value.value) if quantity.value is not None else parsed(quantity.latex)


def _near(value: Number, expression: Any) -> bool | None:
    """True if a written number equals an expression; None if the expression is not a number."""
    other = _evaluated(expression)
    if other is None:
        return None
    if not other.is_real:
        return False
    exactly = Fraction(str(other)) if other.is_Float else Fraction(int(other.p), int(other.q))
    return same_number(value, Number(exactly, abs(exactly) / 10**25, 0))


def _evaluated(expression: Any) -> Any:
    """Evaluates an expression to thirty digits; None if it is not a number."""
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
    """Parses LaTeX with math-verify; None if that fails or the text is prose."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
    from math_verify.parser import parse_latex_cached
    from sympy import Basic, I, MatrixBase

    if not latex.strip() or _is_prose(latex):
        return None
    if len(latex) > _LONGEST_EXPRESSION:
        raise ValueError(f"the expression has {len(latex)} characters, more than {_LONGEST_EXPRESSION}")
    # `verification.py` enforces the time limit; math-verify's own uses a signal, which a long product ignores.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # Units have been removed already: math-verify would take the `t` of `\frac{1}{2}t` for one.
    latex = _DEGREES.sub(r"(\1 \\cdot \\frac{\\pi}{180})", latex) if OF_AN_ANGLE.search(latex) else latex
    latex = re.sub(r"(?<=[\d)}])i(?![A-Za-z])", " i", latex)  # math-verify takes the `i` of `3i` for a variable
    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")
    try:
        found = parse_latex_cached(normalize_latex(latex.replace("°", r"^{\circ}"), config))
    except (RecursionError, MemoryError):
        raise
    except Exception:  # the parser raises errors of many kinds
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
        return 0 < len(reading.text.split()) <= _MAX_WORDS_OF_REFERENCE and bool(_normalised(reading.text))
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
    """True if a candidate is an answer (a few words only if `in_words`), so that no other place is considered."""
    if isinstance(reading, Words):
        return in_words and len(reading.text.split()) <= _MAX_WORDS_OF_ANSWER
    return _is_readable(reading)
