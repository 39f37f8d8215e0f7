"""The configurations that Hydra's sweeper composes, kept for the launchers."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig


class Composed:
    """The configuration of each job of a command line.

    Hydra's sweeper composes all of them for validation and discards them. Composing dominates the time of planning, so
    they are kept.

    Args:
        loader: Hydra's loader, which from now on keeps what it composes.
        config: The configuration of the command line without its sweeps.
    """

    def __init__(self, loader: ConfigLoader, config: DictConfig) -> None:
        self._config = config
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._compose = loader.load_sweep_config
        loader.load_sweep_config = self._keep

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """Returns the configuration of the job with these overrides."""
        return self._composed.get(tuple(overrides)) or self._keep(self._config, list(overrides))

    def _keep(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        config: DictConfig = self._compose(master_config, sweep_overrides)
        self._composed[tuple(sweep_overrides)] = config
        return config
