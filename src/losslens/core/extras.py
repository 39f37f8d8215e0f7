"""What `pip install losslens` leaves out, and the one line that says how to get it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from importlib.util import find_spec

from losslens.core.errors import InputError

# Of each extra of pyproject.toml the modules that its packages are imported by.
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
    """A package that is not installed, of an extra. Its text follows the name of what needs it.

    Args:
        extras: Names of the extras.
        instead: What else would do, if anything.
    """

    def __init__(self, extras: Collection[str], instead: str = "") -> None:
        super().__init__(f"needs: pip install 'losslens[{','.join(extras)}]'{instead and f', or {instead}'}")


def require_extras(*extras: str, instead: str = "") -> None:
    """Refuses to go on without them; nothing is imported for it.

    Args:
        extras: Names of extras.
        instead: What would do without those that are missing.

    Raises:
        MissingExtraError: A package of some is not installed; it names those extras.
    """
    missing = [extra for extra in extras if not all(map(_is_there, MODULES[extra]))]
    if missing:
        raise MissingExtraError(missing, instead)


def missing_extra(error: ModuleNotFoundError) -> MissingExtraError | None:
    """The extra that a module which is not there belongs to, as an error; None for any other module."""
    module = (error.name or "").partition(".")[0]
    extras = [extra for extra, modules in MODULES.items() if module in modules]
    return MissingExtraError(extras) if extras else None


def tell(name: str, error: Exception, line: str = "") -> str:
    """`train.py: …`, or `losslens train needs: pip install …`: an error in the line of the command that met it.

    Args:
        name: What the command was called.
        error: The error.
        line: Its text on one line, where that is not `str(error)`.
    """
    return f"{name}{'' if isinstance(error, MissingExtraError) else ':'} {line or error}"


def _is_there(module: str) -> bool:
    return (module in sys.modules and sys.modules[module] is not None) or find_spec(module) is not None
