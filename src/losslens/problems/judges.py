"""User-defined verifiers, given by the Python path of a class or function that judges a completion."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from losslens.core.errors import InputError, first_line
from losslens.core.redaction import hash_secrets
from losslens.problems import Problem, Verdict, Verifier
from losslens.problems.mathematics import MathVerify

# A path (`mypackage.judges.MyJudge`), or a mapping with `_target_` and the options to create the class with.
VerifierSetting = str | Mapping[str, Any] | None


@dataclass(frozen=True)
class Judge:
    """A user-defined verifier, imported and created in the process that verifies answers.

    Attributes:
        target: Python path of a class, which is created with the options and then called, or of a function.
        options: The options as JSON.
    """

    target: str
    options: str = "{}"

    @property
    def module(self) -> str:
        """Module of the target, for the process that imports it."""
        return self.target.rpartition(".")[0]

    @property
    def needs_network(self) -> bool:
        """True if the target's attribute `needs_network` is."""
        return bool(getattr(_import(self.target), "needs_network", False))

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """See `Verifier`; the target may also return a bool."""
        result = _create(self.target, self.options)(problem, completion)
        if isinstance(result, Verdict):
            return result
        if isinstance(result, bool):
            return Verdict(None, result)
        raise InputError(f"source.verifier={self.target} must return a Verdict or a bool, not {type(result).__name__}")


def verifier_of(setting: VerifierSetting) -> Verifier:
    """Creates the verifier that `source.verifier` names; None: `MathVerify`.

    Raises:
        InputError: It is not the path of an importable class or function, or does not accept the options.
    """
    if setting is None:
        return MathVerify()
    judge = _judge(setting)
    target = _import(judge.target)
    if not callable(target):
        raise InputError(f"source.verifier={judge.target} is neither a class nor a function")
    if not isinstance(target, type) and judge.options != "{}":
        raise InputError(f"source.verifier={judge.target} is a function; only a class can have options")
    if isinstance(target, type):
        _require_options(target, judge)
    return judge


def _require_options(target: type, judge: Judge) -> None:
    """Checks before sampling that a class accepts the options."""
    try:
        inspect.signature(target).bind(**json.loads(judge.options))
    except TypeError as error:
        raise InputError(f"source.verifier={judge.target}: {first_line(error)}") from error
    except ValueError:  # the class has no signature
        return


def identity_of(setting: VerifierSetting) -> dict[str, Any]:
    """Returns the verifier's part of the identity of problems."""
    if setting is None:
        return {"judge": "mathematics", "version": 2}
    judge = _judge(setting)
    return {"judge": judge.target, "options": hash_secrets(json.loads(judge.options))}


def _judge(setting: str | Mapping[str, Any]) -> Judge:
    options = {} if isinstance(setting, str) else {str(name): value for name, value in setting.items()}
    target = setting if isinstance(setting, str) else options.pop("_target_", None)
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")) or "." not in target:
        raise InputError(
            "source.verifier must be a Python path such as mypackage.judges.MyJudge, or {_target_: PATH, OPTION: VALUE}"
            f", not {target if isinstance(setting, str) else dict(setting)!r}"
        )
    try:
        return Judge(target, json.dumps(options, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise InputError(f"source.verifier={target}: options must be JSON values ({first_line(error)})") from error


def _import(target: str) -> Callable[..., Any]:
    module, _, name = target.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise InputError(f"source.verifier={target}: {module} has no {name}") from error
    except Exception as error:  # importing a user's module can raise anything
        raise InputError(f"source.verifier={target}: {type(error).__name__}: {first_line(error)}") from error
    return found


@lru_cache(maxsize=8)
def _create(target: str, options: str) -> Callable[[Problem, str], Any]:
    verifier = _import(target)
    if not isinstance(verifier, type):
        return verifier
    try:
        made: Callable[[Problem, str], Any] = verifier(**json.loads(options))
    except TypeError as error:
        raise InputError(f"source.verifier={target}: {first_line(error)}") from error
    return made
