"""Labels of runs, made of the settings in which they differ."""

from __future__ import annotations

from typing import Any

import pytest

from losslens.core.mappings import flatten
from losslens.runs.labels import labels

pytestmark = pytest.mark.fast


def identity(method: str, **changes: Any) -> dict[str, Any]:
    options = {key: changes.pop(key) for key in ("beta", "bias") if key in changes}
    return {
        "format": 4, "method": {"name": method, "version": 1, **options}, "train_on": "all",
        "learning_rate": 1e-4 if method == "dpo" else 1e-3, "lora": {"r": 8, "alpha": 16.0, "targets": ["q", "k"]},
        "base": {"sha256": "a" * 64}, "optim": {"max_steps": 100, "batch_size": 32}, "rollouts": {"sha256": "b" * 64},
        "seed": 42, "init_seed": 42, **changes,
    }  # fmt: skip


def of(*identities: dict[str, Any]) -> list[str]:
    return list(labels({f"run-{number}": each for number, each in enumerate(identities)}).values())


def test_methods_alone() -> None:
    assert of(identity("sft"), identity("dpo", beta=0.1)) == ["sft", "dpo"]


def test_an_option_of_one_method() -> None:
    found = of(identity("sft"), identity("dpo", beta=0.1), identity("dpo", beta=0.3))
    assert found == ["sft", "dpo β=0.1", "dpo β=0.3"]
    assert of(identity("grpo", bias=0.0), identity("grpo", bias=0.1)) == ["grpo bias 0", "grpo bias 0.1"]


def test_seeds_are_in_all_labels_if_they_differ() -> None:
    assert of(identity("sft"), identity("dpo"), identity("dpo", init_seed=1)) == [
        "sft init 42", "dpo init 42", "dpo init 1",
    ]  # fmt: skip
    assert of(identity("sft", seed=1, init_seed=1), identity("sft", seed=2, init_seed=2)) == [
        "sft s1 init 1", "sft s2 init 2",
    ]  # fmt: skip


def test_an_option_and_an_initial_adapter_at_once() -> None:
    """Once two runs of β 0.1 and 0.3 were "dpo s42 init 42" both, and differed by their hash alone."""
    found = of(*(identity("dpo", beta=beta, init_seed=init) for beta in (0.1, 0.3) for init in (42, 7)))
    assert found == ["dpo β=0.1 init 42", "dpo β=0.1 init 7", "dpo β=0.3 init 42", "dpo β=0.3 init 7"]


def test_settings_that_only_the_hash_distinguishes() -> None:
    plain = identity("sft")
    for change, label in (
        ({"optim": {"max_steps": 200, "batch_size": 32}}, "sft max_steps 200"),
        ({"lora": {"r": 16, "alpha": 32.0, "targets": ["q", "k"]}}, "sft r16"),
        ({"lora": {"r": 8, "alpha": 16.0, "targets": ["q"]}}, "sft targets q"),
        ({"learning_rate": 1e-4}, "sft lr 0.0001"),
        ({"train_on": "paired_rollouts"}, "sft train_on paired_rollouts"),
        ({"rollouts": {"sha256": "c" * 64}}, "sft rollouts cccccccc"),
    ):
        first, second = of(plain, {**plain, **change})
        assert second == label
        assert first != second


def test_labels_are_unique() -> None:
    one = identity("sft")
    assert len(set(labels({"a/sft-1": one, "b/sft-1": one}).values())) == 2
    both = of(one, identity("sft", optim={"max_steps": 200, "batch_size": 32}), identity("sft", seed=1))
    assert both == ["sft max_steps 100 s42", "sft max_steps 200 s42", "sft max_steps 100 s1"]


def test_nested_settings_are_flattened_to_dotted_names() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}, "f": None}) == {"a.b": 1, "a.c.d": [2], "e": {}, "f": None}
    assert flatten({}) == flatten("no mapping") == {}
