"""Options that change nothing beside the others: a new run that sets one is refused, and no other option is one."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from losslens.core.errors import InputError
from losslens.losses import Batch, Loss, Method
from losslens.losses.dpo import Dpo
from losslens.losses.grpo import Grpo
from losslens.losses.kto import Kto
from losslens.losses.nft import Nft
from losslens.losses.online_grpo import OnlineGrpo
from losslens.losses.opd import Opd
from losslens.losses.rft import Rft
from losslens.losses.rift import Rift
from losslens.losses.sft import Sft
from losslens.runs.current_words import current_manifest
from losslens.runs.spec import RunSpec, _require_effect
from tests.test_losses import AT_ZERO, variants
from tests.test_renamed_options import spec

pytestmark = pytest.mark.fast

# Four prompts; the first has a correct completion twice, the last only correct ones.
ROLLOUTS = pd.DataFrame(
    {
        "problem_id": list("aaaabbbbccdd"),
        "group": [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3],
        "completion": list("xxyzxyzuxyxy"),
        "reward": [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0],
        "completion_ids": [[0] * length for length in (1, 3, 4, 2, 5, 1, 2, 3, 4, 2, 3, 1)],
    }
)
LOSSES = {
    **variants(),
    **AT_ZERO,
    "grpo bias=0": Grpo(name="grpo", bias=0),
    "rift affine_lambda=0": Rift(name="rift", form="affine", affine_lambda=0),
}


def effect(loss: Loss) -> list[Any]:
    """Everything that training takes from a loss: rows, pairs, divisor, inputs, and the gradients of two batches.

    In the second, far from the base, rewards are 2 and −2.
    """
    table = loss.select(ROLLOUTS.assign(place=range(len(ROLLOUTS))))
    rows = list(range(len(table)))
    pairs = loss.select_pairs(table) if loss.unit == "pair" else None
    if pairs is not None:
        rows = [row for pair in pairs for row in pair]
    place = table["place"].to_numpy()[rows]
    lengths = torch.tensor([len(ids) for ids in table["completion_ids"].iloc[rows]])
    mask = torch.arange(5) < lengths[:, None]
    found: list[Any] = [place.tolist(), loss.divisor, sorted(loss.needs)]
    for scale, rewards in ((0.3, 1.0), (3.0, 4.0)):
        offset = 0.0 if rewards == 1 else -2.0
        columns = loss.columns(ROLLOUTS.assign(reward=rewards * ROLLOUTS["reward"] + offset))
        rng = np.random.default_rng(5)
        values = torch.tensor(rng.exponential(size=(4, len(ROLLOUTS), 5)))[:, place]
        logps, reference, sampler, entropy = (torch.where(mask, -value, 0.0) for value in values)
        logps = (scale * logps).requires_grad_()
        batch = Batch(
            logps=logps,
            mask=mask,
            reward=torch.tensor(rewards * table["reward"].to_numpy()[rows] + offset),
            columns={name: torch.tensor(values[place]) for name, values in columns.items()},
            pairs=None if pairs is None else torch.arange(len(rows)).reshape(-1, 2),
            reference=reference,
            sampler=sampler,
            top_entropy=-entropy,
            divergence=(logps - reference) ** 2,
            step={"mismatched_log_ratio": torch.tensor(0.4, dtype=torch.float64)},
        )
        terms = loss.terms(batch)
        terms = terms.where(mask, 0.0) if loss.unit == "token" else terms
        [gradient] = torch.autograd.grad(terms.sum(), logps)
        found.append(gradient.where(mask, 0.0).numpy().round(12).tolist())
    return found


def others(loss: Loss, option: str) -> Iterator[Loss]:
    """The loss with other values of an option, where they are allowed."""
    kinds = [loss.__class__.model_fields[option].annotation]
    kinds += get_args(kinds[0]) if NoneType in get_args(kinds[0]) else []
    values: list[Any] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            values += get_args(kind)
        else:
            values += [False, True] if kind is bool else [0.45, 2.5, 0.05, None, 0.0, -0.4]
    for value in values:
        try:
            other = type(loss)(**{**loss.model_dump(), option: value})
        except ValidationError:
            continue
        if getattr(other, option) != getattr(loss, option):
            yield other


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_option_has_an_effect_or_is_declared_inert(loss: Loss) -> None:
    own, options = effect(loss), sorted(loss.options)
    for option in options:
        allowed = list(others(loss, option))
        if option in loss.inert:
            assert all(effect(other) == own for other in allowed if option in other.inert), option
        elif allowed:  # `weight_by` has no other value beside a ratio
            assert any(effect(other) != own for other in allowed), option


REFUSED: list[tuple[Method, str]] = [
    (Sft(name="sft", epsilon_high=0.1), "method.epsilon_high=0.1: has no effect: ratio=none does not use it"),
    (Rft(name="rft", behaviour="base"), "method.behaviour=base: has no effect: ratio=none"),
    (Grpo(name="grpo", ratio="cispo", epsilon_low=0.1), "method.epsilon_low=0.1: has no effect: ratio=cispo"),
    (Grpo(name="grpo", ratio="clip", ratio_max=2), "method.ratio_max=2.0: has no effect: ratio=clip"),
    (Grpo(name="grpo", bias=0, bias_scope="all_positive"), "method.bias_scope=all_positive: has no effect: bias=0"),
    (Rift(name="rift", affine_lambda=1), "method.affine_lambda=1.0: has no effect: form=token"),
    (Rift(name="rift", form="naive", reward_incorrect=0), "method.form=naive: has no effect: reward_incorrect=0"),
    (Nft(name="nft", negative_weight=0, epsilon=0.1), "method.epsilon=0.1: has no effect: negative_weight=0"),
    (Dpo(name="dpo", ld_alpha=1.0), "method.ld_alpha=1.0: has no effect: 1 is the whole rollout"),
    (Dpo(name="dpo", label_smoothing=0.2), "method.label_smoothing=0.2: has no effect: loss_type=sigmoid"),
    (Dpo(name="dpo", loss_type="robust", label_smoothing=0.1), "method.label_smoothing=0.1: has no effect: it is"),
    (OnlineGrpo(name="online_grpo", resamples=1), "method.resamples=1: has no effect: recipe=grpo does not use it"),
    (OnlineGrpo(name="online_grpo", overlong_share=0), "method.overlong_share=0.0: has no effect: recipe=grpo"),
]


@pytest.mark.parametrize(("method", "line"), REFUSED, ids=[line.partition(":")[0] for _, line in REFUSED])
def test_setting_one_is_refused(method: Method, line: str) -> None:
    with pytest.raises(InputError) as refusal:
        _require_effect(method)
    assert str(refusal.value).startswith(line)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "method",
    [
        *LOSSES.values(), OnlineGrpo(name="online_grpo"), Opd(name="opd"),
        OnlineGrpo(name="online_grpo", recipe="dapo", resamples=1, overlong_share=0.1),
        Dpo(name="dpo", loss_type="robust", label_smoothing=0.2), Nft(name="nft", epsilon=0.1),
    ],
    ids=repr,
)  # fmt: skip
def test_no_other_option_is_refused(method: Method) -> None:
    if method is not AT_ZERO["rift naive reward_incorrect=0"]:
        _require_effect(method)


def test_a_run_is_refused_and_those_of_before_are_read() -> None:
    with pytest.raises(InputError, match=r"^method\.affine_lambda=0\.3: has no effect: form=token has no λ$"):
        spec("method=rift", "method.affine_lambda=0.3")
    assert Rift(name="rift", affine_lambda=0.3).identity == {"name": "rift", "version": 1, "affine_lambda": 0.3}
    recorded = {"method": "online_grpo", "options": {"epsilon": 0.2, "epsilon_high": None, "kl_coef": 0.1}}
    assert current_manifest(recorded)["options"] == {"kl_coef": 0.1}


def test_an_on_policy_length_limit_has_one_name() -> None:
    """96 is `rollouts.max_tokens`; the identity holds the limit, whatever set it."""
    with pytest.raises(InputError, match=r"^method\.max_tokens=96: has no effect: it is rollouts\.max_tokens$"):
        spec("method=online_grpo", "method.max_tokens=96")
    shorter: RunSpec = spec("method=online_grpo", "method.max_tokens=48")
    assert shorter.identity["own_samples"]["max_tokens"] == 48


def test_what_computes_the_samples_is_not_in_the_identity() -> None:
    assert Opd(name="opd", vllm="off").identity == Opd(name="opd").identity == {"name": "opd", "version": 1}


def test_kto_needs_a_weight() -> None:
    with pytest.raises(ValidationError, match="desirable_weight and undesirable_weight are both 0"):
        Kto(name="kto", desirable_weight=0, undesirable_weight=0)
