"""Optional dependencies (extras), and the error that names a missing one."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from functools import cache
from importlib.util import find_spec

from losslens.core.errors import InputError

# Top-level modules of the packages in each extra of pyproject.toml.
MODULES: Mapping[str, tuple[str, ...]] = {
    "train": (
        "accelerate", "datasets", "huggingface_hub", "latex2sympy2_extended", "math_verify", "peft", "platformdirs",
        "reasoning_gym", "statsmodels", "sympy", "torch", "transformers", "trl",
    ),
    "wandb": ("wandb", "wandb_workspaces"),
    "slurm": ("submitit",),
    "server": ("aiolimiter", "openai"),
    "report": ("jinja2", "markupsafe", "matplotlib", "plotly"),
    "smollm2": ("gguf",),
}  # fmt: skip


class MissingExtraError(InputError):
    """Raised if packages of an extra are not installed. The message follows the name of the command.

    Args:
        extras: Names of the extras.
        instead: An alternative, such as an option that avoids the package.
    """

    def __init__(self, extras: Collection[str], instead: str = "") -> None:
        super().__init__(f"needs: pip install 'losslens[{','.join(extras)}]'{instead and f', or {instead}'}")


def require_extras(*extras: str, instead: str = "") -> None:
    """Checks that extras are installed, without importing them.

    Args:
        extras: Names of extras.
        instead: An alternative, such as an option that avoids the package.

    Raises:
        MissingExtraError: Packages of some extras are not installed.
    """
    missing = [extra for extra in extras if not all(map(_is_there, MODULES[extra]))]
    if missing:
        raise MissingExtraError(missing, instead)


def missing_extra(error: ModuleNotFoundError) -> MissingExtraError | None:
    """Returns the error for the extra that a missing module belongs to; None for any other module."""
    module = (error.name or "").partition(".")[0]
    extras = [extra for extra, modules in MODULES.items() if module in modules]
    return MissingExtraError(extras) if extras else None


def format_error(name: str, error: Exception, line: str = "") -> str:
    """`train.py: …`, or `losslens train needs: pip install …`: an error in the line of the command that met it.

    Args:
        name: What the command was called.
        error: The error.
        line: Its text on one line, where that is not `str(error)`.
    """
    return f"{name}{'' if isinstance(error, MissingExtraError) else ':'} {line or error}"


@cache
def _is_there(module: str) -> bool:
    return (module in sys.modules and sys.modules[module] is not None) or find_spec(module) is not None
