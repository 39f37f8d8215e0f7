r"""Parsing of numbers and units: `1,234.5`, `2 1/2`, `6.63 \times 10^{-34}`, `5 km/h`, `$18`, `50%`, `60°`.

Values are exact fractions, so that nothing is rounded before the comparison.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import NamedTuple

from losslens.problems.answer_text import DOLLAR, IN_TEXT
from losslens.problems.final_answer import CHANGING, JOINING

_LARGEST_EXPONENT = 5000
# A decimal with at least this many digits equals any number that rounds to it: 0.333333 for a third, 3.14159 for pi.
_DIGITS_OF_AN_APPROXIMATION = 6
_ROUNDING_OF_FLOATS = Fraction(1, 10**12)


class Number(NamedTuple):
    """A written number.

    Attributes:
        value: Its exact value.
        ulp: One unit in the last written digit; None for integers and fractions, which are exact.
        digits: Number of significant digits written.
    """

    value: Fraction
    ulp: Fraction | None = None
    digits: int = 0


def same_number(a: Number, b: Number) -> bool:
    """True if two written numbers are equal, or one is the other rounded or truncated to six or more digits."""
    if a.value == b.value:
        return True
    difference = abs(a.value - b.value)
    for rounded in (a, b):
        if rounded.ulp is not None and rounded.digits >= _DIGITS_OF_AN_APPROXIMATION and difference < rounded.ulp:
            return True
    inexact = a.ulp is not None or b.ulp is not None
    return inexact and difference <= _ROUNDING_OF_FLOATS * max(abs(a.value), abs(b.value))


_SIGN = r"(?P<sign>[-+]?)\s*"
_PLAIN = re.compile(_SIGN + r"(?P<whole>\d+)(?:\.(?P<part>\d*))?|[-+]?\.\d+")
_GROUPED = [  # pattern, thousands separator, decimal separator
    (re.compile(r"[-+]?\s*\d{1,3}(?:,\d{3})+(?:\.\d+)?"), ",", "."),
    (re.compile(r"[-+]?\s*\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?"), ",", "."),  # 12,34,567
    (re.compile(r"[-+]?\s*\d{1,3}(?: \d{3})+(?:\.\d+)?"), " ", "."),
    (re.compile(r"[-+]?\s*\d{1,3}(?:'\d{3})+(?:\.\d+)?"), "'", "."),
    (re.compile(r"[-+]?\s*\d{1,3}(?:_\d{3})+(?:\.\d+)?"), "_", "."),
    (re.compile(r"[-+]?\s*\d{1,3}(?:\.\d{3})+,\d+"), ".", ","),  # 1.234,5
    (re.compile(r"[-+]?\s*\d{1,3}(?:\.\d{3}){2,}"), ".", ","),  # 1.234.567
    (re.compile(r"[-+]?\s*\d{1,3}(?: \d{3})+,\d+"), " ", ","),  # 1 234,5
]
_DECIMAL = re.compile(r"\s*([-+]?)\s*(\d*)(?:\.(\d*))?")
_POWER = re.compile(
    r"(?P<mantissa>.*?)(?:[eE](?P<e>[-+]?\d{1,6})"
    r"|\s*(?:\\times|\\cdot|\*|x|X)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*(?P<p>[-+]?\s*\d{1,6})\s*\}|\(?(?P<q>[-+]?\d{1,6})\)?))"
)
_TEN = re.compile(r"(?P<sign>[-+]?)10\s*(?:\^|\*\*)\s*(?:\{\s*(?P<p>[-+]?\s*\d{1,6})\s*\}|\(?(?P<q>[-+]?\d{1,6})\)?)")
_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))|([^/\s]+|\(.*?\))\s*/\s*(\S+)")
_MIXED = re.compile(r"([-+]?)\s*(\d{1,9})\s*(?:\s|\band\b|(?=\\frac))\s*(?:and\s+)?(\\frac.*|\d{1,9}\s*/\s*\d{1,9})")
_REPEATING = re.compile(
    r"([-+]?)(\d*)\.(\d*)(?:\\overline\s*\{(\d+)\}|\\overline\s*(\d)|\\bar\s*\{?(\d+)\}?|\\dot\s*\{?(\d)\}?)"
)
_OPEN = re.compile(r"(.*\.\d{3,})\s*(?:\\ldots|\\dots|\\cdots|\.\.\.|…)")


def number(text: str) -> Number | None:
    """Parses a number; None if the text is not a number."""
    text = text.strip()
    if not text or len(text) > 400 or not any(sign.isdigit() for sign in text):
        return None
    if match := _OPEN.fullmatch(text):
        truncated = _decimal(match[1])
        return truncated and truncated._replace(digits=max(truncated.digits, _DIGITS_OF_AN_APPROXIMATION))
    value = _decimal(text) or _scientific(text) or _fraction(text) or _mixed(text) or _repeating(text)
    if value is None and re.match(r"[-+]\s*\(.*\)$", text):
        inner = number(text[text.index("(") + 1 : -1])
        return inner and inner._replace(value=-inner.value if text[0] == "-" else inner.value)
    return value


def _decimal(text: str) -> Number | None:
    for pattern, thousands, point in _GROUPED:
        if pattern.fullmatch(text):
            text = text.replace(thousands, "").replace(point, ".")
            break
    match = _DECIMAL.fullmatch(text.strip())
    if match is None or not (match[2] or match[3]):
        return None
    sign, whole, part = match[1], match[2] or "0", match[3]
    value = Fraction(int(whole + (part or "")), 10 ** len(part or ""))
    digits = len((whole + (part or "")).lstrip("0"))
    return Number(-value if sign == "-" else value, Fraction(1, 10 ** len(part)) if part else None, digits)


def _scientific(text: str) -> Number | None:
    if match := _TEN.fullmatch(text):
        exponent = _exponent(match["p"] or match["q"])
        return None if exponent is None else Number(-exponent if match["sign"] else exponent)
    match = _POWER.fullmatch(text)
    mantissa = _decimal(match["mantissa"].strip()) if match else None
    exponent = _exponent(match["e"] or match["p"] or match["q"]) if match else None
    if mantissa is None or exponent is None:
        return None
    return Number(mantissa.value * exponent, (mantissa.ulp or Fraction(1)) * exponent, mantissa.digits)


def _exponent(text: str) -> Fraction | None:
    power = int(text.replace(" ", ""))
    return Fraction(10) ** power if abs(power) <= _LARGEST_EXPONENT else None


def _fraction(text: str) -> Number | None:
    sign = text[:1] if text[:1] in "-+" else ""
    match = _FRACTION.fullmatch(text[len(sign) :].strip())
    if match is None:
        return None
    above, below = (
        _decimal((part or "").strip("() "))
        for part in (match[1] or match[2] or match[5], match[3] or match[4] or match[6])
    )
    if above is None or below is None or below.value == 0:
        return None
    value = above.value / below.value
    return Number(-value if sign == "-" else value)


def _mixed(text: str) -> Number | None:
    match = _MIXED.fullmatch(text)
    part = _fraction(match[3].strip()) if match else None
    if match is None or part is None or not 0 <= part.value < 1:
        return None
    value = int(match[2]) + part.value
    return Number(-value if match[1] == "-" else value)


def _repeating(text: str) -> Number | None:
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    before, again = match[3], match[4] or match[5] or match[6] or match[7]
    value = int(match[2] or "0") + Fraction(int(before or "0"), 10 ** len(before))
    value += Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(before))
    return Number(-value if match[1] == "-" else value)


_SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = dict(
    zip(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], range(20, 100, 10), strict=True)
)
_NUMBER_WORDS = {**{word: n for n, word in enumerate(_SMALL)}, **_TENS}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2,
    "halves": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "eighth": 8,
    "tenth": 10,
}


_AND_A_HALF = re.compile(r"^([\dA-Za-z-]+) and (?:a|one) half\b", re.I)


def _is_a_number(word: str) -> bool:
    return word.lower() in _NUMBER_WORDS or any(sign.isdigit() for sign in word)


def number_in_words(text: str) -> str:
    """Replaces a number in words at the beginning of a text by digits (`twenty-one apples`, `5 million`)."""
    if signed := re.fullmatch(r"(?:minus|negative)\s+(.*)", text, re.I | re.S):
        unsigned = number_in_words(signed[1])
        return f"-{unsigned}" if unsigned[:1].isdigit() else text
    text = _AND_A_HALF.sub(r"\1 1/2", text)
    words = re.findall(r"[A-Za-z]+|\S", text.replace("-", " "))
    total, current, count, any_word = 0, 0, 0, False
    for word in words:
        low = word.lower()
        if low in _NUMBER_WORDS:
            current += _NUMBER_WORDS[low]
        elif low == "hundred" and any_word:
            current *= 100
        elif low in _SCALES and any_word:
            total, current = total + current * _SCALES[low], 0
        elif low == "and" and any_word and words[count + 1 : count + 2] and words[count + 1].lower() in _NUMBER_WORDS:
            pass
        else:
            break
        any_word = True
        count += 1
    rest = words[count:]
    if not any_word:
        scaled = re.fullmatch(rf"({DOLLAR}?\s*[-+]?\s*[\d.,]+)\s*({'|'.join(_SCALES)})\b\s*(.*)", text, re.I)
        value = number(scaled[1].lstrip(DOLLAR)) if scaled else None
        if scaled is None or value is None:
            return "1/2" if re.fullmatch(r"(?:a |one )?half", text, re.I) else text
        product = value.value * _SCALES[scaled[2].lower()]
        return f"{DOLLAR if scaled[1].startswith(DOLLAR) else ''}{_shortest(product)} {scaled[3]}".strip()
    part = rest[0].lower() if rest else ""
    part = part if part in _PARTS else part.removesuffix("s")
    whole = len(rest) == 1 or (rest[1:2] == ["of"] and not any(_is_a_number(word) for word in rest[2:]))
    if part in _PARTS and whole:  # two thirds of the cake
        return f"{total + current}/{_PARTS[part]}"
    after = re.split(r"[\s-]+", text, maxsplit=count)
    return f"{total + current} {after[count] if len(after) > count else ''}".strip()


def _shortest(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"


@dataclass(frozen=True)
class Unit:
    """A known unit, as a multiple of base units.

    Attributes:
        factor: Number of base units.
        base: The base units with their powers, sorted.
    """

    factor: Fraction
    base: tuple[tuple[str, int], ...]


PERCENT = Unit(Fraction(1), (("%", 1),))
DEGREE = Unit(Fraction(1), (("°", 1),))
RADIAN = Unit(Fraction(1), (("rad", 1),))

# names | factor | base units; symbols that take SI prefixes are below
_WORDS = """
in inch inches|0.0254|m
ft foot feet|0.3048|m
yd yard yards|0.9144|m
mi mile miles|1609.344|m
lb lbs pound pounds £|453.59237|g
oz ounce ounces|28.349523125|g
ton tons tonne tonnes|1000000|g
kgs|1000|g
kms|1000|m
sec secs second seconds|1|s
min mins minute minutes|60|s
h hr hrs hour hours|3600|s
day days|86400|s
week weeks wk wks|604800|s
month months|1|month
yr yrs year years|12|month
gallon gallons gal|16|cup
quart quarts qt|4|cup
pint pints pt|2|cup
cup cups|1|cup
cc|0.000001|m^3
acre acres|4046.8564224|m^2
hectare hectares ha|10000|m^2
° degree degrees deg|1|°
rad radian radians|1|rad
°C degC|1|°C
°F degF|1|°F
¤ dollar dollars USD buck bucks US$|1|¤
¢ cent cents|0.01|¤
€ euro euros EUR|1|€
¥ yen yuan RMB CNY|1|¥
₹ rupee rupees Rs INR|1|₹
kcal Cal|1000|cal
cal calorie calories|1|cal
dozen dozens|1|dozen
mph|0.44704|m s^-1
kmh kmph kph|5/18|m s^-1
% percent percentage pct|1|%
"""
_SYMBOLS = ["m", "g", "s", "L", "l", "N", "J", "W", "V", "A", "Hz", "Pa", "mol", "eV", "Ω", "T", "C", "F", "K"]
_PREFIXES = {"": 0, "n": -9, "μ": -6, "µ": -6, "u": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9}
_LONG = {
    **dict.fromkeys(("meter", "metre"), "m"), "gram": "g", "gramme": "g", **dict.fromkeys(("liter", "litre"), "L"),
    "newton": "N", "joule": "J", "watt": "W", "volt": "V", "ampere": "A", "amp": "A", "hertz": "Hz", "pascal": "Pa",
    "mole": "mol", "electronvolt": "eV", "ohm": "Ω", "tesla": "T", "coulomb": "C", "farad": "F", "kelvin": "K",
}  # fmt: skip
_LONG_PREFIXES = {"": 0, "nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9}


@lru_cache(maxsize=1)
def _units() -> dict[str, tuple[Fraction, dict[str, int]]]:
    known: dict[str, tuple[Fraction, dict[str, int]]] = {}
    for symbol in _SYMBOLS:
        base, size = ({"m": 3}, Fraction(1, 1000)) if symbol in "Ll" else ({symbol: 1}, Fraction(1))
        for prefix, power in _PREFIXES.items():
            known[prefix + symbol] = size * Fraction(10) ** power, base
    for word, symbol in _LONG.items():
        for prefix, power in _LONG_PREFIXES.items():
            factor, base = known[symbol]
            for name in (prefix + word, f"{prefix}{word}s"):
                known[name] = factor * Fraction(10) ** power, base
    for line in _WORDS.strip().splitlines():
        names, how_many, of = line.split("|")
        powers = {}
        for part in of.split():
            name, _, exponent = part.partition("^")
            powers[name] = int(exponent or 1)
        for name in names.split():
            known[name] = Fraction(how_many), powers
    return known


_UNIT_TOKEN = re.compile(
    r"\s*(/|\bper\b|\\cdot|\*|·|(?P<name>°\s?[CF]\b|[A-Za-zμµΩ]+\$?|[°%¤¢€£¥₹])(?:\s*\^\s*\{?\s*(?P<power>-?\d)\s*\}?|(?P<digit>[23])(?!\d))?)\s*"
)
_WORDY = [
    (re.compile(r"\b(?:square|sq\.?)\s+([A-Za-z]+)"), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu\.?)\s+([A-Za-z]+)"), r"\1^3"),
    (re.compile(r"\b([A-Za-z]+)\s+squared\b"), r"\1^2"),
    (re.compile(r"\b([A-Za-z]+)\s+cubed\b"), r"\1^3"),
    (re.compile(r"(?:\\circ|\^\s*\{?\\circ\}?|\\degree)"), "°"),
    (re.compile(r"(?:°|\bdegrees?\b|\bdeg\b)\s*(?:C\b|Celsius\b|celsius\b)"), "°C"),
    (re.compile(r"(?:°|\bdegrees?\b|\bdeg\b)\s*(?:F\b|Fahrenheit\b|fahrenheit\b)"), "°F"),
]


def unit(text: str) -> Unit | None:
    r"""Parses a unit (`km/h`, `\text{ cm}^2`, `square feet`, `miles per hour`); None if it is unknown."""
    text = IN_TEXT.sub(r" \1", text).replace("{}", "").strip(" .()")
    for pattern, instead in _WORDY:
        text = pattern.sub(instead, text)
    known = _units()
    factor, powers, sign, at = Fraction(1), dict[str, int](), 1, 0
    if not text:
        return None
    while at < len(text):
        match = _UNIT_TOKEN.match(text, at)
        if match is None:
            return None
        at = match.end()
        if match["name"] is None:
            sign = -1 if match[1] in ("/", "per") else sign
            continue
        name = match["name"].replace(" ", "")
        definition = known.get(name) or known.get(name.lower()) if len(name) > 1 else known.get(name)
        if definition is None:
            return None
        power = sign * int(match["power"] or match["digit"] or 1)
        factor *= definition[0] ** power
        for base, base_power in definition[1].items():
            powers[base] = powers.get(base, 0) + base_power * power
    return Unit(factor, tuple(sorted((name, power) for name, power in powers.items() if power)))


# Words after a value that are mathematics and not what is counted.
_OF_MATHS = frozenset(
    """
    pi sqrt sin cos tan cot sec csc log ln exp lim or and to inf infinity mod times plus minus over choose if
    where for with when all is are not by in than but unless arcsin arccos arctan min max gcd lcm frac cdot
    cases
    """.split()  # noqa: SIM905
)
_POWERS_OF_UNITS = re.compile(r"(?<=[A-Za-z}Ωµμ])\s*\^\s*\{?\s*(-?[1-9])\s*\}?")
_STAND_IN = str.maketrans("-123456789", "⁻¹²³⁴⁵⁶⁷⁸⁹")
_BACK = str.maketrans("⁻¹²³⁴⁵⁶⁷⁸⁹", "-123456789")
_LAST_OF_VALUE = re.compile(r"(?:[\d)}\]!|]|\\(?:pi|infty|alpha|beta|theta)\b|(?<=[\d}\])])[a-zA-Z]\b|\.\d)\.?")


def _are_counted(nouns: list[str]) -> bool:
    """True if words after a value only name what is counted: not `squared`, `thirds`, `apples and three pears`."""
    first = nouns[0]
    if first in CHANGING or (first in _OF_MATHS and nouns[:2] != ["times", "as"]) or "or" in nouns:
        return False
    if first not in ("quarters", "quarter") and (first in _PARTS or first.removesuffix("s") in _PARTS):
        return False
    return not any(word in JOINING and _is_a_number(after) for word, after in pairwise(nouns))


def without_unit(text: str) -> tuple[str, Unit | None, str]:
    """Separates a value from the unit after it, or from the currency before it.

    Returns:
        The value; its unit if known, else None; the words in place of a unit if they are not a known one.
    """
    text = text.strip()
    money = re.match(rf"(-?)\s*(?:US|USD|A|C)?\s*([{DOLLAR}€£¥₹]|Rs\.?|USD|EUR)\s*(?=[-\d.\\])", text)
    if money:
        value, also, words = without_unit(money[1] + text[money.end() :])
        coin = unit(money[2].rstrip(".")) or Unit(Fraction(1), ((money[2], 1),))
        # `$5 per hour`, `$5 dollars`
        return value, (coin if also is None or also == coin else also), "" if also is None else words
    copy = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\circ\b|\\degree\b", "°", text)
    copy = IN_TEXT.sub(r" \1", copy)
    copy = re.sub(r"\\mu\s*(?=[A-Za-z])", "μ", copy).replace(r"\Omega", "Ω")
    copy = _POWERS_OF_UNITS.sub(lambda m: m[1].translate(_STAND_IN), copy)
    end = 0
    for match in _LAST_OF_VALUE.finditer(copy):
        end = match.end()
    if not end:
        return text, None, ""
    value, after = copy[:end], copy[end:]
    name = after.strip(" .,")
    if not name:
        return text, None, ""
    known = unit(re.sub(r"[⁻¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: f"^{m[0].translate(_BACK)}", name))
    attached = not after[:1].isspace()
    value = re.sub(r"[⁻¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: f"^{{{m[0].translate(_BACK)}}}", value).strip()
    if known is not None and not (attached and len(name) == 1 and name.isalpha()):
        return value, known, ""
    nouns = re.sub(r"\([^()]*\)$", "", name).split()
    if (
        nouns
        and not attached
        and all(re.fullmatch(r"[A-Za-z$'/.,⁻¹²³⁴-]+", word) for word in nouns)
        and len(nouns[0].strip(".,")) > 2
        and _are_counted([word.lower().strip(".,") for word in nouns])
    ):
        counted = " ".join(takewhile(lambda word: word not in ("in", "of", "on", "for", "at", "from"), nouns))
        return value, unit(counted) if counted != name else None, " ".join(nouns)
    return text, None, ""
