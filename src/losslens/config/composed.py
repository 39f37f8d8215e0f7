"""Composition of the configurations of a sweep's jobs: once for each choice of groups, and kept for the launchers."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Sequence
from functools import cache, lru_cache

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException


class Composed:
    """The configuration of each job of a command line.

    Hydra's sweeper composes the configuration of every job, from the files, to validate it, and discards it; a launcher
    composes it once more. Here the files are read once for each choice of groups (`method=sft`), to which the values of
    the jobs (`seed=1`) are applied as Hydra does it, and what the sweeper composes is kept.

    Args:
        loader: Hydra's loader, which from now on composes in this way.
        config: The configuration of the command line without its sweeps.
    """

    def __init__(self, loader: ConfigLoaderImpl, config: DictConfig) -> None:
        self._loader, self._config = loader, config
        self._compose = loader.load_sweep_config
        self._hydra_overrides = list(config.hydra.overrides.hydra)
        _, files = loader._parse_overrides_and_create_caching_repo(config.hydra.job.config_name, self._hydra_overrides)
        self._is_group = cache(files.group_exists)
        self._by_groups: dict[tuple[str, ...], bytes] = {}  # pickled: a quarter of the time of copying them
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        loader.load_sweep_config = self._keep

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """Returns the configuration of the job with these overrides, another object each time."""
        kept = self._composed.pop(tuple(overrides), None)
        if kept is not None and not self._composed:
            gc.unfreeze()  # what follows is training, whose garbage is collected
        return self._composed_anew(list(overrides)) if kept is None else kept

    def _keep(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        config = self._composed[tuple(sweep_overrides)] = self._composed_anew(sweep_overrides)
        # It lives until all jobs are planned. To look for garbage among those of 1,000 jobs, again and again, took a
        # tenth of the time.
        gc.freeze()
        return config

    def _composed_anew(self, lines: list[str]) -> DictConfig:
        try:
            return self._with_values(lines)
        except OmegaConfBaseException as error:
            raise ConfigCompositionException from error

    def _with_values(self, lines: list[str]) -> DictConfig:
        overrides = [_parsed(line) for line in lines]
        self._loader.validate_sweep_overrides_legal(overrides, RunMode.RUN, from_shell=True)
        groups = [each for each in overrides if each.is_hydra_override() or self._is_of_group(each)]
        if any(isinstance(each.value(), dict) for each in groups):
            whole: DictConfig = self._compose(self._config, lines)  # a value and not a choice: the order counts
            return whole
        config: DictConfig = pickle.loads(self._of_groups(tuple(str(each.input_line) for each in groups)))
        values = [each for each in overrides if each not in groups]
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        task = [each for each in overrides if not each.is_hydra_override()]
        config.hydra.overrides.task = [each.input_line for each in task]
        names = config.hydra.job.config.override_dirname
        with open_dict(config.hydra):
            config.hydra.job.override_dirname = get_overrides_dirname(
                overrides=task, kv_sep=names.kv_sep, item_sep=names.item_sep, exclude_keys=names.exclude_keys
            )
        OmegaConf.copy_cache(from_config=self._config, to_config=config)
        return config

    def _is_of_group(self, override: Override) -> bool:
        return override.package is not None or self._is_group(override.key_or_group)

    def _of_groups(self, lines: tuple[str, ...]) -> bytes:
        if lines not in self._by_groups:
            self._by_groups[lines] = pickle.dumps(self._compose(self._config, list(lines)))
        return self._by_groups[lines]


@lru_cache(maxsize=4096)
def _parsed(line: str) -> Override:
    [override] = _parser().parse_overrides([line])
    return override


# Once: the signature of each of Hydra's functions is inspected.
_parser = cache(OverridesParser.create)
