"""As much of GraphQL as a stub server needs: a document is parsed, and the asked fields are taken from plain objects.

An object is a dict from field names to values; a value that is called gets the field's arguments by name. What is asked
but not there is answered with null and named in `missing`, so that a stub says what it does not cover. A `__typename`
that the object does not have is the one its fragment is on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_TOKEN = re.compile(r'"""(?:.|\n)*?"""|"(?:[^"\\]|\\.)*"|\.\.\.|-?\d+(?:\.\d+)?|[A-Za-z_]\w*|[{}()\[\]:$!=@|&]|#[^\n]*')


@dataclass
class Field:
    """A selected field: what to call it in the answer, its arguments (values, or `Variable`), and what of it."""

    name: str
    alias: str
    arguments: dict[str, Any] = field(default_factory=dict)
    selected: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Variable:
    name: str


@dataclass(frozen=True)
class Spread:
    """A fragment to be put in here, by name or as it stands: the type it is on, and what of it."""

    fragment: str | tuple[str, list[Any]]


class _Reader:
    def __init__(self, text: str):
        self.tokens = [token for token in _TOKEN.findall(text) if not token.startswith("#")]
        self.at = 0

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def skip_parentheses(self) -> None:
        depth = 0
        while True:
            depth += {"(": 1, ")": -1}.get(self.take(), 0)
            if depth == 0:
                return

    def defaults(self) -> dict[str, Any]:
        """Of an operation's variables, those that have a value when none is sent."""
        found: dict[str, Any] = {}
        self.take()
        while self.next != ")":
            token = self.take()
            if token == "$":
                name = self.take()
            elif token == "=":
                found[name] = self.value()
        self.take()
        return found

    def skip_directives(self) -> None:
        while self.next == "@":
            self.take(), self.take()
            if self.next == "(":
                self.skip_parentheses()

    def value(self) -> Any:
        token = self.take()
        if token == "$":
            return Variable(self.take())
        if token == "{":
            return self.arguments("}")
        if token == "[":
            values = []
            while self.next != "]":
                values.append(self.value())
            self.take()
            return values
        if token.startswith('"'):
            return token.strip('"')
        if re.fullmatch(r"-?\d+", token):
            return int(token)
        return {"true": True, "false": False, "null": None}.get(token, token)

    def arguments(self, end: str) -> dict[str, Any]:
        found = {}
        while self.next != end:
            name = self.take()
            assert self.take() == ":", f"no value for {name}"
            found[name] = self.value()
        self.take()
        return found

    def selection(self) -> list[Any]:
        assert self.take() == "{"
        found: list[Any] = []
        while self.next != "}":
            name = self.take()
            if name == "...":
                if self.next in ("on", "{", "@"):
                    kind = (self.take(), self.take())[1] if self.next == "on" else ""
                    self.skip_directives()
                    found.append(Spread((kind, self.selection())))
                else:
                    found.append(Spread(self.take()))
                    self.skip_directives()
                continue
            selected = Field(name, name)
            if self.next == ":":
                self.take()
                selected.name = self.take()
            if self.next == "(":
                self.take()
                selected.arguments = self.arguments(")")
            self.skip_directives()
            if self.next == "{":
                selected.selected = self.selection()
            found.append(selected)
        self.take()
        return found


def answer(
    text: str, variables: dict[str, Any], root: dict[str, Any], missing: Callable[[str], None]
) -> dict[str, Any]:
    """The data that the one operation in `text` asks of `root`; `missing` is told the path of each unknown field."""
    reader, fragments, operation = _Reader(text), {}, None
    while reader.next:
        kind = reader.take() if reader.next != "{" else "query"
        if kind == "fragment":
            name, _, on = reader.take(), reader.take(), reader.take()
            reader.skip_directives()
            fragments[name] = (on, reader.selection())
            continue
        if reader.next not in ("{", "(", "@"):
            reader.take()
        if reader.next == "(":
            variables = {**reader.defaults(), **variables}
        reader.skip_directives()
        operation = reader.selection()
    assert operation is not None, "no operation"

    def filled(value: Any) -> Any:
        if isinstance(value, Variable):
            return variables.get(value.name)
        if isinstance(value, dict):
            return {name: filled(each) for name, each in value.items()}
        return [filled(each) for each in value] if isinstance(value, list) else value

    def of(value: Any, selected: list[Any], path: str, kind: str = "") -> Any:
        if isinstance(value, list):
            return [of(each, selected, path) for each in value]
        if not isinstance(value, dict) or not selected:
            return value
        given: dict[str, Any] = {}
        for each in selected:
            if isinstance(each, Spread):
                on, inner = fragments[each.fragment] if isinstance(each.fragment, str) else each.fragment
                given.update(of(value, inner, path, on))
                continue
            here = f"{path}.{each.name}"
            if each.name not in value:
                given[each.alias] = kind if each.name == "__typename" else missing(here)
                continue
            found = value[each.name]
            if callable(found):
                found = found(**filled(each.arguments))
            given[each.alias] = of(found, each.selected, here)
        return given

    return of(root, operation, "")
