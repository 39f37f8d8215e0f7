r"""Normalisation of answers: Unicode symbols become LaTeX and ASCII, and markup is removed.

Completions may be hostile, so every search takes time linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata

DOLLAR = "¤"  # stands for a dollar sign that means money, as opposed to those that enclose mathematics

# Characters that NFKC would flatten (`x²` to `x2`) or leave in a form that the parser does not know.
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
_SIGNS = {
    **dict.fromkeys("−–—‒﹣－‐‑", "-"),
    **dict.fromkeys("×✕✖⨯", r"\times "),
    **dict.fromkeys("·⋅∙•⋆∗", r"\cdot "),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("º˚", "°"),
    **dict.fromkeys("“”„«»〝〞", '"'),
    **dict.fromkeys("‘’‚′‵ʼ", "'"),
    **dict.fromkeys("⟨〈", r"\langle "),
    **dict.fromkeys("⟩〉", r"\rangle "),
    **dict.fromkeys("∶：", ":"),
    **dict.fromkeys("，、", ","),
    "。": ".",
    "．": ".",
    "；": ";",
    "℃": "°C",
    "℉": "°F",
    "π": r"\pi ",
    "𝜋": r"\pi ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "⩽": r"\le ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≃": r"\approx ",
    "≅": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "∈": r"\in ",
    "∴": "",
    "⇒": r"\Rightarrow ",
    "→": r"\to ",
    "∠": r"\angle ",
    "△": r"\triangle ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "∖": r"\setminus ",
    "\N{ARABIC DECIMAL SEPARATOR}": ".",
    "\N{ARABIC THOUSANDS SEPARATOR}": ",",
    "٪": "%",
    "％": "%",
    "＄": DOLLAR,
    "∛": r"\sqrt[3]",
    "∜": r"\sqrt[4]",
    "√": r"\sqrt",
}
_GREEK = {
    unicodedata.lookup(f"GREEK SMALL LETTER {name.upper()}"): rf"\{latex} "
    for name, latex in [
        *(
            (n, n)
            for n in [
                "alpha",
                "beta",
                "gamma",
                "delta",
                "epsilon",
                "zeta",
                "eta",
                "theta",
                "iota",
                "kappa",
                "mu",
                "nu",
                "xi",
                "rho",
                "sigma",
                "tau",
            ]
        ),
        *((n, n) for n in ["upsilon", "phi", "chi", "psi", "omega"]),
        ("lamda", "lambda"),
    ]
}
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_SCRIPTS = re.compile(f"([{''.join(_SUPERSCRIPTS)}]+)|([{''.join(_SUBSCRIPTS)}]+)")
_ROOT = re.compile(r"(\\sqrt(?:\[\d\])?)\s*(?:(\d+(?:\.\d+)?|[A-Za-z])|\(([^()]*)\))")

_SPACING = re.compile(r"\\(?:quad|qquad|thinspace|medspace|thickspace|enspace|space|hfill|newline|,|;|:|>| )|(?<!\\)~")
_ROW = "␤"
_NOTHING = re.compile(
    r"\\!\s*|\\(?:displaystyle|textstyle|limits|nolimits|boldmath|therefore|mathstrut)\b"
    r"|\\(?:left|right|middle|bigl|bigr|Bigl|Bigr|big|Big|bigg|Bigg|biggl|biggr)(?![a-zA-Z])\.?"
    r"|\\phantom\{[^{}]*\}|\\label\{[^{}]*\}"
)
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up|sc|md)?|mbox|hbox|textup|mathrm|mathbf|mathit|mathsf|mathtt|boldsymbol|bm"
    r"|operatorname\*?|emph|underline|mathnormal)\s*\{"
)
IN_TEXT = re.compile(r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_OLD_FONT = re.compile(r"\{\s*\\(?:rm|bf|it|sf|tt)\b\s*([^{}]*)\}")
_HTML = re.compile(
    r"</?(?:b|i|em|strong|u|code|span|p|div|br|sub|answer|final|result|math|mark|tt)\b[^<>]{0,100}>", re.I
)
_BOLD = re.compile(r"(?<![\w)\]}*])(\*\*|__)(?=[^\s*_])([^*_\n]{1,400})(?<=\S)\1(?![\w(*])")
_ITALIC = re.compile(r"(?<![\w)\]}*\\])\*(?=[^\s*])([^*\n]{1,400})(?<=[^\s*])\*(?![\w(*])")
_FILLER = re.compile(
    r"^(?:(?:is|are|be|equals?|equal to|approximately|approx\.?|about|around|roughly|nearly|exactly|only|just|simply"
    r"|thus|therefore|hence|so|clearly|indeed|also|now|then|obviously|given by|a total of|in total|total of|answer"
    r"|final answer|the answer is|therefore,|option|choice|letter)\b[\s,:]*"
    r"|[=:≈]\s*|\\approx\s*|\\Rightarrow\s*|\\implies\s*)",
    re.I,
)


def plain(text: str) -> str:
    r"""Converts Unicode digits, fractions, powers, minus signs, roots, spaces and Greek letters to LaTeX and ASCII.

    `½` becomes `\frac{1}{2}`, `x²` becomes `x^{2}`, `−` becomes `-`, `٣` becomes `3`; `60°` is unchanged. Invisible
    characters are removed.
    """
    if text.isascii():
        return text
    text = _INVISIBLE.sub("", text)
    text = _SCRIPTS.sub(_script, text)
    out = []
    for sign in text:
        if sign.isascii():
            out.append(sign)
        elif sign in _SIGNS:
            out.append(_SIGNS[sign])
        elif (fraction := unicodedata.normalize("NFKC", sign)).count("\N{FRACTION SLASH}") == 1 and len(fraction) > 2:
            above, below = fraction.split("\N{FRACTION SLASH}")
            out.append(rf"\frac{{{above}}}{{{below}}}")
        elif (digit := unicodedata.decimal(sign, None)) is not None:
            out.append(str(digit))
        elif sign.isspace():
            out.append("\n" if sign in "\u2028\u2029\x85" else " ")
        else:
            out.append(sign)
    text = unicodedata.normalize("NFKC", "".join(out))
    text = "".join(_GREEK.get(sign, "-" if sign == "−" else sign) for sign in text)
    return _ROOT.sub(lambda m: f"{m[1]}{{{m[2] or m[3] or ''}}}", text)


def _script(match: re.Match[str]) -> str:
    if match[1] is not None:
        return "^{" + "".join(_SUPERSCRIPTS[sign] for sign in match[1]) + "}"
    return "_{" + "".join(_SUBSCRIPTS[sign] for sign in match[2]) + "}"


def without_markup(text: str) -> str:
    r"""Removes markup from an answer: bold, italics, tags, quotes, dollars, `\(…\)`, fonts, a final full stop.

    Fonts and `\mathrm` become `\text`; a dollar sign that means money becomes `DOLLAR`.
    """
    text = _HTML.sub("", plain(text).replace("\\$", DOLLAR)).replace("\\%", "%")
    text = _BOLD.sub(r"\2", text)
    text = _ITALIC.sub(r"\1", text)
    text = _money(text)
    text = re.sub(
        r"\\[\[\]()]|\\begin\{(?:equation|align|gather|center)\*?\}|\\end\{(?:equation|align|gather|center)\*?\}",
        "",
        text,
    )
    text = _TEXT.sub(r"\\text{", _OLD_FONT.sub(r"\\text{\1}", text))
    text = re.sub(r"\\text\s*\{[\s.,;:!]*\}", " ", text)
    rows = _ROW if "\\begin" in text else " "
    text = _NOTHING.sub("", _SPACING.sub(" ", text.replace("\\\\", rows))).replace(_ROW, r" \\ ")
    text = (
        text.replace("{,}", ",")
        .replace("{.}", ".")
        .replace("{:}", ":")
        .replace(r"\dfrac", r"\frac")
        .replace(r"\tfrac", r"\frac")
    )
    text = text.replace(r"\cfrac", r"\frac").replace("`", "")
    before = None
    while before != text:
        before = text
        text = text.strip().strip("\"'").strip()
        text = re.sub(r"^(?:\*\*|__|\*(?=\S)|#+\s|>\s|[-*]\s(?=\D))\s*|(?<!\*)\*{1,2}$|(?<=\w)__$", "", text).strip()
        text = re.sub(r"(?<!\.)[.,;:]$|(?<=\.\.)\.$", "", text) if not text.endswith("...") else text
        text = _FILLER.sub("", text)
    return text


def _money(text: str) -> str:
    """Removes pairs of dollar signs, which enclose mathematics; replaces any other by `DOLLAR`."""
    text = text.replace("$$", "$")
    if "$" not in text:
        return text
    out, last, open_ = [], 0, None
    for at in (m.start() for m in re.finditer(r"\$", text)):
        after, before = text[at + 1 : at + 2], text[at - 1 : at]
        if open_ is None:
            open_ = at
        elif (before.isspace() and text[open_ + 1 : open_ + 2].isdigit()) or (after.isdigit() and before.isspace()):
            # `$5 and $6`: the previous dollar sign meant money
            out += [text[last:open_], DOLLAR]
            last, open_ = open_ + 1, at
        else:
            out += [text[last:open_], text[open_ + 1 : at]]
            last, open_ = at + 1, None
    if open_ is not None:
        out += [text[last:open_], DOLLAR]
        last = open_ + 1
    return "".join(out) + text[last:]
