"""LossLens: train every loss on the same frozen rollouts, then look at what each did to the weights."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# Of `losslens.api`, imported when one is asked for: `losslens --help` needs none of it.
_API = ("Comparison", "Sweep", "compare", "load_sweep")


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(import_module("losslens.api"), name)
    raise AttributeError(f"module 'losslens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
