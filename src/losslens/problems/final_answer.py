r"""Location of the final answer in a completion: in a tag or box, after an announcement, or at the end.

Answers are interpreted elsewhere (`quantities.py`, `reading.py`). Completions may be hostile, so every search takes
time linear in the length of the text.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import TypeVar

from losslens.problems.answer_text import plain

T = TypeVar("T")
_EMPTY = re.compile(r"\\(?:ldots|dots|cdots|quad|text|mathrm|hspace|_|,|;|!|:| )|[\s{}$.…_?~*]")


def final_answers(completion: str) -> tuple[bool, list[list[str]]]:
    r"""Finds the places where a completion may state its answer, the most explicit one first.

    In order: the last non-empty `<answer>…</answer>`; the last non-empty `\boxed{…}` (together with adjacent boxes, as
    a further wording); the text after `####`; the text after the last “answer is” or “Answer:”; otherwise the last
    line, the end of the last sentence, the last formula or number. Text before the last `</think>` is ignored.

    Returns:
        True if the completion states explicitly which is its answer; and the places, each as one or more wordings.
    """
    text = completion
    for end in ("</think>", "</thinking>", "</reasoning>"):
        text = text.rpartition(end)[2]
    tag = _last_tag(text)
    if tag is not None:
        inner = _boxes(tag)
        return True, [inner] if inner else _places_in(tag)
    boxes = _boxes(text)
    if boxes:
        return True, [boxes, *_places_in(boxes[0])[1:]]
    places = []
    if "####" in text and (line := text.rpartition("####")[2].strip().split("\n")[0].strip()):
        places.append([line])
    announced = _announced(text)
    if announced:
        return True, [*places, announced]
    return bool(places), [*places, *_at_the_end(text)]


def _places_in(answer: str) -> list[list[str]]:
    """Returns the content of a tag or box and, if it is prose, the answer that the prose states."""
    if len(answer.split()) < 4:
        return [[answer]]
    announced = _announced(answer)
    return [[answer], announced] if announced else [[answer], *_at_the_end(answer)]


def _last_tag(text: str) -> str | None:
    low = text.lower()
    end = len(low)
    while (start := low.rfind("<answer>", 0, end)) >= 0:
        close = low.find("</answer>", start, len(low))
        inner = text[start + len("<answer>") : close if close >= 0 else len(text)]
        if _EMPTY.sub("", inner):
            return inner
        end = start
    return None


_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
_BETWEEN_BOXES = re.compile(
    r"\\(?:quad|qquad|text|mathrm|,|;| |\(|\)|\[|\])|\b(?:and|or)\b|\b[A-Za-z](?:_\w)?\s*=|[\s$,;&{}.*]"
)


def _boxes(text: str) -> list[str]:
    """Returns the content of the last non-empty box; also, as one list, of all boxes directly adjacent to it."""
    found: list[tuple[int, int, str]] = []
    for match in list(_BOX.finditer(text))[-20:]:
        content, end = _braced(text, match.end())
        if _EMPTY.sub("", content):
            found.append((match.start(), end, content))
    if not found:
        return []
    start, _, last = found[-1]
    beside = [last]
    for before, end, content in reversed(found[:-1]):
        between = text[end:start]
        if len(between) > 60 or "." in between or _BETWEEN_BOXES.sub("", between):
            break
        beside.insert(0, content)
        start = before
    return [last] if len(beside) == 1 else [last, ", ".join(beside)]


def _braced(text: str, at: int) -> tuple[str, int]:
    """Returns the content of the braces that open at `at`, and their end; up to the end of the line if not closed."""
    if text[at : at + 1] != "{":
        token = re.match(r"[^\s$.,;]*", text[at : at + 60])
        return (token[0] if token else ""), at + (token.end() if token else 0)
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.S).finditer(text, at):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[at + 1 : match.start()], match.end()
    return text[at + 1 :].split("\n")[0].rstrip("$ "), len(text)


_ANNOUNCED = re.compile(
    r"\b(?:answer|option|choice)s?\b(?:[ \t]+(?!is\b|are\b)[\w()'-]+){0,8}?[*_\s]*(?::|=|\bis\b|\bare\b)[*_]*\s*"
    r"(?:as follows:?)?"
    r"|^[#*_ \t]*(?:the[ \t]+)?(?:final[ \t]+)?answers?[*_: \t]*$"
    r"|\b(?:choose|select|pick)[ \t]+(?:option[ \t]+)?(?=\(?[A-J]\)?[.*_ \t]*$)"
    r"|\b(?:so|thus|therefore|hence)\b[,:]?[ \t]+(?=\(?[A-J]\)?[.*_ \t]*$)"
    r"|答案(?:是|为|：|:)+",
    re.I | re.M,
)
_IS_CORRECT = re.compile(r"\(?\b([A-J])\b\)?(?:[*_]*)\s+is\s+(?:the\s+)?(?:correct|right|best|answer)")
_BECAUSE = re.compile(
    r"[,;]?\s+(?:(?:because|since|which|as|so|where|when|given|not|rather|and not|instead|after|\(since|i\.e\.)\s"
    r"|(?<!divided )(?<!multiplied )by\s(?!\s*[^\W\d_]?[\d\\$(])"
    r"|\([^()=]{0,200}=[^()]{0,200}\)\s*$"
    r"|-+\s+(?=(?!(?:sqrt|pi|sin|cos|tan|log|ln|exp)\b)[^\W\d_]{2})).*",
    re.S,
)


def _last(found: Iterator[T]) -> T | None:
    tail = deque(found, maxlen=1)
    return tail[0] if tail else None


def _announced(text: str) -> list[str]:
    """Returns the wordings of the answer that the text announces."""
    text = plain(text)
    last = _last(match for match in _ANNOUNCED.finditer(text) if not text[match.end() :].startswith("not "))
    correct = _last(_IS_CORRECT.finditer(text))
    if correct is not None and (last is None or correct.start() > last.start() or not text[last.end() :].strip("*_. ")):
        return [correct[1]]
    if last is None:
        return []
    rest = text[last.end() :].lstrip("*_: \t\n")
    if rest.startswith(("$$", "\\[")):
        closing = "$$" if rest.startswith("$$") else "\\]"
        inner = rest[2:].partition(closing)[0]
        if inner.strip():
            return [inner.strip()]
    line = rest.split("\n")[0].strip()
    return _cuts(line)


_END_OF_SENTENCE = re.compile(r"(?<=\S)(?:[.?](?=\s|$|\*|_)|!(?=[*_]*$|[*_]*\s+[^\W\d_]{2}))")


def _cuts(line: str) -> list[str]:
    """Returns a line, and the line cut at its first full stop, before a reason, and after its first value."""
    line = line.strip()
    if not line:
        return []
    sentence = _END_OF_SENTENCE.split(line, maxsplit=1)[0]
    reasoned = _BECAUSE.sub("", sentence)
    wordings = [sentence, line, reasoned]
    if first := next(_values(reasoned[:_LONGEST_PROSE]), None):
        wordings.append(first)
    return list(dict.fromkeys(wording for wording in wordings if wording.strip()))


_COPULA = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?|get|gets|gives?|have|has|makes?|obtain)\b|:(?=\s)|(?<![<>!])=)\s*"
)
_VALUE = re.compile(
    r"\$\$(?P<a>[^$]+)\$\$|\\\[(?P<b>(?:(?!\\\]).)+)\\\]|\\\((?P<c>(?:(?!\\\)).)+)\\\)"
    r"|(?<!\\)\$(?=\S)(?P<d>[^$\n]*[^$\s\\])\$(?!\d)"
    r"|(?P<e>(?:(?<![\w.)}])-\s?)?(?:\\?\$|[¤€£¥₹])?\s?(?:\d+\s)?\\frac\{[^{}]*\}\{[^{}]*\})"
    r"|(?P<f>(?:(?<![\w.)}])[-+]\s?)?(?:\\?\$|[¤€£¥₹])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
    r"(?:\s?/\s?\d+|\s\d+/\d+|:\d+)?(?:\s?\\?%)?)",
    re.S,
)
_AFTER = re.compile(r"\s?(?:\\circ|\^\\circ|\^\{\\circ\}|°|%|[A-Za-z]+(?:/[A-Za-z]+)?(?:\^\{?\d\}?)?)")


_NOT_COUNTED = frozenset(
    """
    of in at on by for from and or to is are as so the that which than with more left total because since before
    after a i we it if but was were be not out off up then when there this these those into over under also each
    will
    """.split()  # noqa: SIM905
)


# Words that join two values, and words that change the value before them.
JOINING = frozenset("and or to plus minus times over per in out of by than".split())  # noqa: SIM905
CHANGING = frozenset("squared cubed factorial divided multiplied choose mod modulo raised".split())  # noqa: SIM905
_OF_EXPRESSIONS = frozenset(
    "pi sqrt cbrt sin cos tan cot sec csc log ln exp arcsin arccos arctan sinh cosh tanh infinity".split()  # noqa: SIM905
)
_IN_WORDS = frozenset(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million half
    """.split()  # noqa: SIM905
)
# Words that change the value after them.
_CHANGED = re.compile(
    r"\b(?:minus|negative|not|between|half|third|quarter|twice|double|triple|thrice|root|square|cube|factorial"
    r"|logarithm|reciprocal|inverse|(?:less|more|fewer|greater|larger|smaller|other|rather)\s+than)\b[^.]{0,12}$",
    re.I,
)
_ATOM = re.compile(
    rf"(?P<value>{_VALUE.pattern})(?P<attached>[^\W\d_]*)"
    r"|\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{(?P<text>[^{}]*)\}"
    r"|(?P<command>\\[A-Za-z]+|\\.)|(?P<word>[^\W\d_]+(?:'[a-z]+)?)|(?P<stop>[.?\n])|(?P<sign>\S)",
    re.S,
)
_MARKS = re.compile(r"(?<=\S)(?:\*\*?|__)(?=[\s.,;:!?)]|$)|(?:(?<=\s)|^)(?:\*\*?|__)(?=\S)")
_NEGATIVE = re.compile(r"(?<![\d)}$]\s)\b(?:minus|negative)\s+(?=[\d.])", re.I)
_A_PART = re.compile(r"\s+(?:half|third|quarter)\b", re.I)
_MAX_NOUNS = 4  # after a value
_LONGEST_PROSE = 2000  # characters searched for a value


def _values(text: str) -> Iterator[str]:
    r"""Yields the values in prose, in order, each at its full length.

    Joined values count as one: `5 + 3`, `2\sqrt{3}`, `5/x`, `5 or 6`, `5 apples and 3 pears`. A value that is changed
    by the words before it (`less than 5`) is skipped.
    """
    text = _NEGATIVE.sub("-", _MARKS.sub("", text))
    for start, end in _runs(text):
        if _CHANGED.search(text[max(0, start - 40) : start]):
            continue
        whole = _VALUE.fullmatch(text, start, end)
        inner = whole and next((whole[name] for name in "abcd" if whole[name]), None)
        if inner:
            yield inner
            continue
        after = _AFTER.match(text, end)
        counted = after[0] if after and after[0].strip().lower() not in _NOT_COUNTED | JOINING else ""
        yield text[start:end].rstrip(",") + counted


_PARENTHESIS = re.compile(r"(?<=\s)\((?!\s*(?:base|mod)\b)([^()]{0,200})\)")
_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2,}")


def _begins_prose(text: str, at: int, nouns: int) -> bool:
    """True if the character after a value begins a remark: `(a dozen)`, `: 2 blue and 1 white`."""
    if text[at] == ":":
        return nouns > 0 or (text[at + 1 : at + 2].isspace() and not text[at - 1].isspace())
    remark = _PARENTHESIS.match(text, at)
    return remark is not None and any(word not in _OF_EXPRESSIONS for word in _WORD.findall(remark[1]))


def _runs(text: str) -> Iterator[tuple[int, int]]:
    """Yields start and end of each value in a text: a run of mathematics with a number, including joining words."""
    start, end, has_value, nouns, joint = -1, -1, False, 0, ""
    for atom in _ATOM.finditer(text):
        kind = atom.lastgroup if atom.lastgroup in ("text", "command", "word", "stop", "sign") else "value"
        word = (atom["word"] or (atom["text"] or "").strip(" ,")).lower()
        attached = start >= 0 and atom.start() == end
        if kind == "value" and joint == "," and re.match(r"\s+of\b", text[atom.end() : atom.end() + 10]):
            part = False  # 5 apples, 3 of which are red
        elif kind == "word":
            part = (
                (len(word) == 1 and nouns == 0 and (attached or word not in ("a", "i") or joint in tuple("+-*/^=")))
                or (joint == "and" and word == "a" and _A_PART.match(text, atom.end()) is not None)
                or word in _OF_EXPRESSIONS
                or (word in _IN_WORDS and joint not in ("", "(") and has_value)
                or (word in CHANGING and has_value and not nouns and not joint)
                or (word == "base" and joint in ("in", "("))
                or (joint in ("+", "*", "^", "×") and has_value)
            )
        else:
            part = kind in ("value", "command") or (kind == "text" and word not in JOINING)
        if kind == "sign" and has_value and _begins_prose(text, atom.start(), nouns):
            yield start, end
            start, end, has_value, nouns, joint = -1, -1, False, 0, ""
        elif part:
            if start < 0:
                start = atom.start()
            end, nouns, joint = atom.end(), 0, ""
            has_value = has_value or kind == "value"
        elif kind == "sign" and atom[0] in ")]}!°%'" and attached:
            end = atom.end()
        elif kind == "sign" and start < 0:
            if atom[0] in "([{-+" and not text[atom.end() : atom.end() + 1].isspace():
                start, end, joint = atom.start(), atom.end(), "("
        elif kind == "sign" and atom[0] not in '"`#@&':
            joint = atom[0] if joint in ("", ",", "(") or atom[0] not in "([{-+" else joint
        elif has_value and word in JOINING and joint in ("", ",", word, "out"):
            joint = word
        elif kind in ("word", "text") and has_value and not joint and word not in _NOT_COUNTED and nouns < _MAX_NOUNS:
            nouns += 1
        else:
            if has_value:
                yield start, end
            start, end, has_value, nouns, joint = -1, -1, False, 0, ""
    if has_value:
        yield start, len(text) if joint and joint in "+-*/^=" else end  # the text ends with an operator


def _at_the_end(text: str) -> list[list[str]]:
    """Returns candidates in a text without an announcement: a short last line, the end of its sentence, a value."""
    text = plain(text).strip()
    lines = [line.strip() for line in text[-4000:].split("\n") if line.strip(" *_#-")]
    if not lines:
        return []
    places = []
    sentence = [part for part in re.split(r"(?<=[^\s.])[.!?](?:\s|$)", lines[-1]) if part.strip(" *_")]
    if sentence:
        end = _COPULA.split(sentence[-1])
        if len(end) > 1 and end[-1].strip():
            places.append([end[-1], _BECAUSE.sub("", end[-1])])
    words = len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", lines[-1]))
    if len(lines[-1]) < 200 and words < (8 if len(lines) == 1 else 4):
        places.insert(len(places) if words else 0, [lines[-1], _BECAUSE.sub("", lines[-1])])
    last = _last(_values(text[-4000:]))
    if last is not None:
        places.append([last])
    if verdict := re.match(r"[*_]*(yes|no|true|false)\b", lines[0], re.I):
        places.append([verdict[1]])
    return places
