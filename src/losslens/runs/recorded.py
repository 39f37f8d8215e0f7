"""Safe conversion of a recorded manifest back to a configuration: values only, without importing what it names.

A run folder may come from an untrusted source. Classes, permission to run code, servers and their API keys are taken
only from the reader's own command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from losslens.config.data import Data, Rollouts, Server
from losslens.config.model import Model
from losslens.core.errors import UnavailableError
from losslens.problems import is_own_source

# Keys of the configuration whose values name code.
_CODE_KEYS = ("_target_", "verifier")


@dataclass(frozen=True)
class Trust:
    """Permissions that the command line grants to a manifest.

    Attributes:
        remote_code: Allow running code that comes with the base.
        sources: User-defined classes of problem sources and verifiers that a manifest may name.
    """

    remote_code: bool = False
    sources: tuple[str, ...] = ()


def model_of(recorded: Mapping[str, Any], trust: Trust) -> Model:
    """Returns the configuration of a run's base; only `trust` decides whether the model's own code may run.

    Raises:
        ValidationError: The recorded configuration of the model is invalid.
    """
    return Model.model_validate({**recorded, "trust_remote_code": trust.remote_code})


def rollouts_of(recorded: Mapping[str, Any]) -> Rollouts:
    """Returns how a run's rollouts were sampled, without anything that the recorded server would be asked or run with.

    What a vLLM server sampled from a local model is sampled in this process instead, which needs no command.

    Raises:
        ValidationError: The recorded configuration of the rollouts is invalid.
    """
    rollouts = Rollouts.model_validate(recorded)
    options = Server.model_fields
    own = {name: options[name].get_default(call_default_factory=True) for name in ("command", "args", "start_timeout")}
    server = rollouts.server.model_copy(update={**own, "base_url": None})
    engine = "transformers" if rollouts.engine == "vllm" else rollouts.engine
    return rollouts.model_copy(update={"server": server, "engine": engine})


def data_of(recorded: Mapping[str, Any], trust: Trust) -> Data:
    """Returns the configuration of a run's problems.

    Raises:
        ValidationError: The recorded configuration of the problems is invalid.
        UnavailableError: It names code that the command line does not allow.
    """
    data = Data.model_validate(recorded)
    for name in _code_named_in(data.model_dump()):
        if name not in trust.sources and not is_own_source(name):
            raise UnavailableError(
                f"the manifest names code for its problems, {name[:100]!r}, which is only run if the command line "
                "allows it with sources=[…]"
            )
    return data


def _code_named_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if key in _CODE_KEYS and entry is not None and not isinstance(entry, Mapping):
                yield str(entry)
            yield from _code_named_in(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _code_named_in(entry)
