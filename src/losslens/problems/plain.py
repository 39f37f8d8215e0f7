"""Answers that a scorer may safely evaluate: literals and formulas, distinguished from code by their grammar."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

# Functions in the answers of reasoning-gym and of models; sympy would read any other name as a symbol.
_FUNCTIONS = {
    "Abs", "acos", "acosh", "acot", "asec", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "cot",
    "coth", "csc", "erf", "exp", "li", "ln", "log", "Max", "Min", "Rational", "sec", "sech", "sign", "sin",
    "sinc", "sinh", "sqrt", "tan", "tanh",
}  # fmt: skip
_SYMBOL = re.compile(r"[A-Za-zα-ωΑ-Ω][A-Za-z0-9α-ωΑ-Ω]*(_[A-Za-z0-9]+)?")
_WORDS = re.compile(r"[\w\s+-]*")  # no call, no attribute, no subscript
_SIGNS = (ast.USub, ast.UAdd, ast.Load)
_LONGEST = 10_000  # characters
_LARGEST_EXPONENT = 100


def is_literal(text: str) -> bool:
    """True if `text` evaluates to a literal: words, or lists of numbers and strings."""
    if _WORDS.fullmatch(text):
        return True
    tree = _parsed(text)
    literal = (ast.List, ast.Tuple, ast.Constant, ast.UnaryOp, *_SIGNS)
    return tree is not None and all(isinstance(node, literal) for node in ast.walk(tree))


def is_arithmetic(text: str) -> bool:
    """True if `text` consists only of numbers, `+ - * / // % **` and parentheses."""
    return _is_formula(text, lambda node: False)


def is_formula(text: str) -> bool:
    """True if `text` is arithmetic with symbols and elementary functions in sympy's notation, without factorials."""
    return _is_formula(text, _is_symbolic)


def _is_symbolic(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return _SYMBOL.fullmatch(node.id) is not None
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and not node.keywords
    )


def _is_formula(text: str, may_be: Callable[[ast.AST], bool]) -> bool:
    tree = _parsed(text)
    return tree is not None and all(_is_arithmetic(node) or may_be(node) for node in ast.walk(tree))


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _is_small(node.right)
    return isinstance(
        node, (ast.BinOp, ast.UnaryOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, *_SIGNS)
    )


def _is_small(exponent: ast.expr) -> bool:
    """True if an exponent is at most a hundred and not itself a power, so that the result is not excessively large."""
    nodes = list(ast.walk(exponent))
    numbers = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return not any(isinstance(node, ast.Pow) for node in nodes) and all(
        isinstance(number, (int, float)) and abs(number) <= _LARGEST_EXPONENT for number in numbers
    )


def _parsed(text: str) -> ast.expr | None:
    """Parses an expression; None if `text` is not one, or too long to be an answer."""
    if len(text) > _LONGEST:
        return None
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
