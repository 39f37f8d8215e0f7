"""Options that were renamed: an old word ends in one line that says the new one, and no run gets another folder."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from losslens.cli.arguments import explain_rejection
from losslens.config.identity import in_current_words
from losslens.config.parse import current_name, parse, renamed_options
from losslens.config.training import Optim, TrainConfig
from losslens.core.errors import InputError
from losslens.losses.grpo import Grpo
from losslens.losses.rft import Rft
from losslens.runs.current_words import current_manifest, readable_settings
from losslens.runs.spec import RunSpec
from tests.conftest import ROOT, script


def spec(*overrides: str) -> RunSpec:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return RunSpec.of(parse(TrainConfig, compose("train", list(overrides))))


@pytest.mark.parametrize(
    ("overrides", "digits"),
    [  # as commit 5c14357 named them, by the words of then
        ([], "972138b4"),
        (["optim.warmup_ratio=0.1"], "8750c353"),
        (["rollouts.samples_per_prompt=7"], "814832d2"),
        (["data.train_size=50"], "8947a9c1"),
        (["lr.peak=0.5"], "aca0e3b8"),
        (["model.default_lr=0.01"], "21e99fb9"),
        (["train_on=paired_rollouts"], "d9c35060"),
        (["method=rft", "method.incorrect=drop"], "0383d95b"),
        (["method=grpo", "method.weight_by=prob"], "2017bb0d"),
        (["method=topr", "method.level=geometric"], "1447dc94"),  # as commit 7581468 named it
        (["method=rift", "method.reward_correct=2", "method.reward_incorrect=-1"], "b39f0f36"),
    ],
)
def test_a_renamed_option_leaves_the_folder_as_it_was(overrides: list[str], digits: str) -> None:
    assert spec(*overrides).run.name.endswith(f"-{digits}")


def test_every_old_name_is_gone_from_the_configuration() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = {name: compose(name, overrides=o) for name, o in (("train", []), ("analyze", []))}
    for old, new in renamed_options().items():
        for config in composed.values():
            node: Any = config
            for part in old.split("."):
                node = node.get(part) if node is not None and hasattr(node, "get") and part in node else None
            assert node is None, old
        assert old != new


@pytest.mark.parametrize(
    ("name", "argument", "said"),
    [
        ("train.py", "rollouts.k=3", "rollouts.samples_per_prompt"),
        ("train.py", "method.wrong=filter", "method.incorrect"),
        ("train.py", "train_on=dpo_rows", "train_on=paired_rollouts"),
        ("train.py", "experiment=dpo_rows", "experiment=paired_rollouts"),
        ("analyze.py", "at=norm", "checkpoint"),
        ("analyze.py", "held_out.problems=5", "probe_set.problems"),
    ],
)
def test_an_old_word_ends_in_the_new_one(name: str, argument: str, said: str, tmp_path: Any) -> None:
    outcome = script(name, argument, f"output_dir={tmp_path}", check=2)
    [line] = outcome.stderr.splitlines()
    assert argument.partition("=")[0] in line
    assert f"called {said} now" in line
    assert not list(tmp_path.iterdir())


def test_an_old_word_of_one_loss_that_is_anothers_of_today() -> None:
    """`method.ratio` was TOPR's, and is SFT's."""

    def said(*arguments: str) -> str:
        return explain_rejection(arguments, ROOT / "conf", TrainConfig)

    assert said("method=topr", "method.ratio=geometric").endswith(
        "method.ratio of method=topr is called method.level now"
    )
    assert "called" not in said("method=dft", "method.ratio=clip")


def test_an_old_value_of_a_loss_option() -> None:
    with pytest.raises(InputError, match=r"method\.incorrect=filter: called method\.incorrect=drop now"):
        spec("method=rft", "method.incorrect=filter")
    with pytest.raises(InputError, match=r"method\.weight_by=True: called method\.weight_by=prob now"):
        spec("method=grpo", "method.weight_by=true")


def test_a_benchmark_has_its_own_options() -> None:
    assert current_name("benchmark.gsm8k.eval") == "benchmark.gsm8k.eval_size"
    assert current_name("benchmark.gsm8k.seed") is None
    assert current_name("rollouts.temperature") is None


def test_an_earlier_manifest_is_read_in_the_words_of_today() -> None:
    manifest = {
        "method": "rft", "options": {"wrong": "filter", "deduplicate": False}, "trained_on": {"share_right": 0.25},
        "rollouts": {"sha256": "1", "share_right": 0.5},
        "identity": {"method": {"name": "rft", "version": 1, "wrong": "filter"}, "train_on": "dpo_rows"},
        "config": {
            "method": {"name": "rft", "wrong": "filter"}, "train_on": "dpo_rows", "lr": {"base": 1e-3, "name": "x"},
            "data": {"train": 5, "eval": 2}, "benchmark": {"a": {"train": None, "eval": 3}}, "optim": {"warmup": 0.1},
            "rollouts": {"k": 4}, "evaluation": {"samples": 1}, "model": {"lr": 1.0},
            "logger": {"name": "none", "references": "auto"},
        },
    }  # fmt: skip
    before = json.dumps(manifest)
    now = current_manifest(manifest)
    assert json.dumps(manifest) == before
    assert now["identity"] == manifest["identity"]
    assert now["options"] == {"incorrect": "drop", "deduplicate": False}
    assert now["trained_on"] == {"pass_rate": 0.25}
    assert now["rollouts"] == {"sha256": "1", "pass_rate": 0.5}
    assert now["config"] == {
        "method": {"name": "rft", "incorrect": "drop"}, "train_on": "paired_rollouts",
        "lr": {"name": "x", "peak": 1e-3}, "data": {"train_size": 5, "eval_size": 2},
        "benchmark": {"a": {"train_size": None, "eval_size": 3}}, "optim": {"warmup_ratio": 0.1},
        "rollouts": {"samples_per_prompt": 4}, "evaluation": {"samples_per_prompt": 1}, "model": {"default_lr": 1.0},
        "logger": {"name": "none"}, "weight_tracking": {"references": "auto"},
    }  # fmt: skip
    assert current_manifest(now) == now


def test_what_a_reader_is_shown_has_the_words_of_today() -> None:
    run = spec("method=grpo", "method.weight_by=prob", "train_on=paired_rollouts", "optim.warmup_ratio=0.1")
    assert run.identity["method"] == {"name": "grpo", "version": 1, "prob_weight": True}
    shown = readable_settings(run.identity, run.loss.options)
    assert shown["method"]["weight_by"] == "prob"
    assert "prob_weight" not in shown["method"]
    assert shown["train_on"] == "paired_rollouts"
    assert shown["optim"]["warmup_ratio"] == 0.1
    assert shown["rollouts"]["sampling"]["samples_per_prompt"] == 4


def test_values_of_other_types_stay_apart() -> None:
    assert in_current_words(Grpo, {"prob_weight": 1}) == {"weight_by": 1}  # no switch: refused by the loss itself
    assert in_current_words(Grpo, {"prob_weight": False}) == {"weight_by": "logp"}
    assert in_current_words(Rft, {"wrong": "mask"}) == {"incorrect": "mask"}
    assert in_current_words(Optim, "nothing") == "nothing"
