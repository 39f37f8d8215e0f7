"""Verifiers of one's own, named by their Python path: a class or function that judges a completion."""

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

# A path (`mypackage.judges.MyJudge`), or a mapping with `_target_` and the options that the class is made with.
VerifierSetting = str | Mapping[str, Any] | None


@dataclass(frozen=True)
class Judge:
    """A verifier of one's own. It is imported and made in the process that checks answers.

    Attributes:
        target: Its Python path: a class, made with the options and then called; or a function.
        options: The options, as JSON.
    """

    target: str
    options: str = "{}"

    @property
    def module(self) -> str:
        """Module of the target, for the process that imports it."""
        return self.target.rpartition(".")[0]

    @property
    def needs_network(self) -> bool:
        """Whether the target asks for the network (its attribute `needs_network`)."""
        return bool(getattr(_found(self.target), "needs_network", False))

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """See `Verifier`; what the target answers may also be just true or false."""
        said = _made(self.target, self.options)(problem, completion)
        if isinstance(said, Verdict):
            return said
        if isinstance(said, bool):
            return Verdict(None, said)
        raise InputError(f"source.verifier={self.target}: gives {type(said).__name__}, not a Verdict, true or false")


def verifier_of(setting: VerifierSetting) -> Verifier:
    """Builds the verifier that `source.verifier` names; None: `MathVerify`.

    Raises:
        InputError: It is no path of a class or function that can be imported, or does not take the options.
    """
    if setting is None:
        return MathVerify()
    judge = _judge(setting)
    target = _found(judge.target)
    if not callable(target):
        raise InputError(f"source.verifier={judge.target}: neither a class nor a function")
    if not isinstance(target, type) and judge.options != "{}":
        raise InputError(f"source.verifier={judge.target}: options are for a class; this is a function")
    if isinstance(target, type):
        _require_options(target, judge)
    return judge


def _require_options(target: type, judge: Judge) -> None:
    """Refuses options that a class does not take, before anything is sampled for it to judge."""
    try:
        inspect.signature(target).bind(**json.loads(judge.options))
    except TypeError as error:
        raise InputError(f"source.verifier={judge.target}: {first_line(error)}") from error
    except ValueError:  # a class whose signature is not known
        return


def identity_of(setting: VerifierSetting) -> dict[str, Any]:
    """Names what judges, for the identity of problems."""
    if setting is None:
        return {"judge": "mathematics", "version": 2}
    judge = _judge(setting)
    return {"judge": judge.target, "options": hash_secrets(json.loads(judge.options))}


def _judge(setting: str | Mapping[str, Any]) -> Judge:
    options = {} if isinstance(setting, str) else {str(name): value for name, value in setting.items()}
    target = setting if isinstance(setting, str) else options.pop("_target_", None)
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")) or "." not in target:
        raise InputError(
            f"source.verifier: a Python path such as mypackage.judges.MyJudge, or {{_target_: PATH, OPTION: VALUE}}, "
            f"got {target if isinstance(setting, str) else dict(setting)!r}"
        )
    try:
        return Judge(target, json.dumps(options, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise InputError(f"source.verifier={target}: options are plain values ({first_line(error)})") from error


def _found(target: str) -> Callable[..., Any]:
    module, _, name = target.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise InputError(f"source.verifier={target}: {module} has no {name}") from error
    except Exception as error:  # whatever a module of one's own may raise when it is imported
        raise InputError(f"source.verifier={target}: {type(error).__name__}: {first_line(error)}") from error
    return found


@lru_cache(maxsize=8)
def _made(target: str, options: str) -> Callable[[Problem, str], Any]:
    found = _found(target)
    if not isinstance(found, type):
        return found
    try:
        made: Callable[[Problem, str], Any] = found(**json.loads(options))
    except TypeError as error:
        raise InputError(f"source.verifier={target}: {first_line(error)}") from error
    return made
