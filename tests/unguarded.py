"""A verifier that evaluates what it is given, where Python's own guard is down and only the kernel's walls stand."""

from __future__ import annotations

from losslens.problems import sandbox
from tests.test_sandbox import Evaluates


class Unguarded(Evaluates):
    """As `Evaluates`; `sandbox` imports its module before it closes, and finds its guard gone."""


sandbox._Guard.__call__ = lambda *_: None  # type: ignore[method-assign]
