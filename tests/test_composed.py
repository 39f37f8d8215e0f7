"""Configurations of a sweep's jobs are those that Hydra composes, from the files and one by one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

import losslens.config.parse  # noqa: F401  # registers the interpolations
from losslens.config.composed import Composed
from tests.conftest import ROOT

pytestmark = pytest.mark.fast


@pytest.fixture
def loader() -> Iterator[Any]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _master(loader: Any, *overrides: str) -> Any:
    return loader.load_configuration("train", list(overrides), RunMode.MULTIRUN)


def _content(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=False)


@pytest.mark.parametrize(
    "line",
    [
        ["method=dpo", "seed=3"],
        ["seed=3", "method=dpo", "method.beta=0.5", "lr=matched"],
        ["optim.max_steps=7", "lr.peak=2e-3", "rollouts.policy=base", "+model.extra={a: 1}"],
        ["method={beta: 2}", "method=dpo"],
        ["model.path=HuggingFaceTB/SmolLM2-135M", "adapter=none", "~train_on"],
        ["experiment=loss_family", "benchmark=[own,gsm8k]", "benchmark.gsm8k.eval_size=3"],
        ["server@evaluation.server=openai", "evaluation.engine=openai"],
        ["hydra.job.chdir=true", "seed=3"],
        [],
    ],
)
def test_it_is_what_hydra_composes(loader: Any, line: list[str]) -> None:
    master = _master(loader)
    expected = loader.load_sweep_config(master, line)
    composed = Composed(loader, master)
    before = _content(composed(["method=dpo"]))
    found = composed(line)
    assert _content(found) == _content(expected)
    for key in ("model", "rollouts", "optim", "lr", "method", "evaluation", "data"):
        assert OmegaConf.to_container(found[key], resolve=True) == OmegaConf.to_container(expected[key], resolve=True)
    assert OmegaConf.is_struct(found) == OmegaConf.is_struct(expected)
    assert _content(Composed(loader, master)(["method=dpo"])) == before  # no job changes another


def test_jobs_share_what_is_read_and_nothing_else(loader: Any) -> None:
    master = _master(loader)
    read = []
    compose = loader.load_sweep_config
    loader.load_sweep_config = lambda config, lines: read.append(lines) or compose(config, lines)
    composed = Composed(loader, master)
    configs = [composed([f"method={method}", f"seed={seed}"]) for seed in range(5) for method in ("sft", "dpo")]
    assert read == [["method=sft"], ["method=dpo"]]
    assert [(config.method.name, config.seed) for config in configs[:3]] == [("sft", 0), ("dpo", 0), ("sft", 1)]
    other = deepcopy(configs[2])
    configs[0].optim.max_steps = 12345
    assert configs[2] == other


def test_jobs_alike_have_a_configuration_each(loader: Any) -> None:
    """The sweeper composes both, then the launcher asks for each and takes `hydra` from it."""
    master = _master(loader)
    composed = Composed(loader, master)
    line = ["method=dpo", "seed=3"]
    by_sweeper = [loader.load_sweep_config(master, line) for _ in range(2)]
    expected = _content(by_sweeper[0])
    by_launcher = []
    for _ in range(3):
        config = composed(line)
        assert _content(config) == expected
        with open_dict(config):
            del config["hydra"]
        by_launcher.append(config)
    assert by_launcher[0] is by_sweeper[1]  # composed once more only where it has been taken
    assert len({id(config) for config in by_launcher}) == 3


def test_garbage_is_looked_for_again_once_all_jobs_are_taken(loader: Any) -> None:
    """A sweeper may plan in rounds, with trainings in between."""
    master = _master(loader)
    composed = Composed(loader, master)
    lines = [["method=dpo", "seed=3"], ["seed=4"]]
    for line in lines:
        loader.load_sweep_config(master, line)
    assert gc.get_freeze_count() > 0
    composed(lines[0])
    assert gc.get_freeze_count() > 0
    composed(lines[1])
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("line", [["optim.nothing=1"], ["method=nothing"], ["nothing@x=1"], ["~nothing"], ["seed=1,2"]])
def test_what_hydra_refuses_is_refused_in_its_words(loader: Any, line: list[str]) -> None:
    master = _master(loader)
    with pytest.raises(ConfigCompositionException) as expected:
        loader.load_sweep_config(master, line)
    with pytest.raises(ConfigCompositionException) as found:
        Composed(loader, master)(line)
    assert str(found.value) == str(expected.value)
    assert type(found.value) is type(expected.value)
