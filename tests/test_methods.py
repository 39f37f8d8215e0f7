"""Each loss against numbers derived by hand, and the options that change it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from losslens.errors import InputError
from losslens.methods import Scored
from losslens.methods.dft import dft
from losslens.methods.dpo import Dpo, dpo
from losslens.methods.grpo import Grpo, group_advantages, grpo
from losslens.methods.rft import Rft, rft
from losslens.methods.rift import Rift, rift
from losslens.methods.sft import sft


def scored(probabilities: list[list[float]], reward: list[float], **fields: object) -> Scored:
    """Rollouts with these token probabilities; 0 stands for padding."""
    values = torch.tensor(probabilities, dtype=torch.float64)
    mask = values > 0
    logps = torch.where(mask, values.clamp(min=1e-12).log(), 0.0).requires_grad_()
    rewards = torch.tensor(reward)
    zeros = torch.zeros_like(rewards)
    return Scored(**{"logps": logps, "mask": mask, "reward": rewards, "advantage": zeros, "group": zeros, **fields})


def gradient(loss: torch.Tensor, batch: Scored) -> list[list[float]]:
    """d loss / d log π_t."""
    [grad] = torch.autograd.grad(loss.sum(), batch.logps, retain_graph=True)
    return grad.tolist()


# A right rollout of two tokens (1/2, 1/4) and a wrong one of one token (1/8) with one position of padding.
RIGHT_AND_WRONG = ([[1 / 2, 1 / 4], [1 / 8, 0.0]], [1.0, 0.0])
LN2 = math.log(2)


def test_sft() -> None:
    """−ln ½ − ln ¼ − ln ⅛ = (1 + 2 + 3)·ln 2: the wrong rollout counts like the right one."""
    batch = scored(*RIGHT_AND_WRONG)
    assert sft(batch).sum().item() == pytest.approx(6 * LN2)
    assert gradient(sft(batch), batch) == [[-1, -1], [-1, -1]]  # the trainer's log-probs have no gradient at padding


def test_rft() -> None:
    """−ln ½ − ln ¼ = 3·ln 2, and nothing from the wrong rollout."""
    batch = scored(*RIGHT_AND_WRONG)
    assert rft(batch).sum().item() == pytest.approx(3 * LN2)
    assert gradient(rft(batch), batch)[1] == [0, 0]


def test_dft() -> None:
    """½·ln 2 + ¼·2·ln 2 + ⅛·3·ln 2 = 11/8·ln 2.

    With the stop-gradient d/d log π = −π: −½, −¼, −⅛. Without it, it would be −π(1 + ln π), which for π = ⅛ < 1/e is
    −⅛(1 − 3·ln 2) > 0: the gradient would point the other way.
    """
    batch = scored(*RIGHT_AND_WRONG)
    assert dft(batch).sum().item() == pytest.approx(11 / 8 * LN2)
    [[first, second], [third, _]] = gradient(dft(batch), batch)
    assert (first, second, third) == pytest.approx((-1 / 2, -1 / 4, -1 / 8))


class TestRift:
    def test_token(self) -> None:
        """3·ln 2 from the right rollout, −(−0.2)·⅛ = 0.025 from the wrong one.

        Its gradient there is +0.2·π = 0.025: gradient descent lowers log π of the wrong token, a negative DFT term.
        """
        batch = scored(*RIGHT_AND_WRONG)
        loss = rift(batch)
        assert loss.sum().item() == pytest.approx(3 * LN2 + 0.025)
        assert loss[1, 1].item() == 0  # padding
        assert gradient(loss, batch)[1][0] == pytest.approx(0.025)

    def test_sequence_mean(self) -> None:
        """A wrong rollout (½, ⅛): mean log π = −2·ln 2, so ¼; twice 0.2·¼, once for each token, is 0.1.

        d/d log π_t of 2·0.2·exp(mean) is 0.2·¼ = 0.05 for each of the two tokens.
        """
        batch = scored([[1 / 2, 1 / 8, 0.0]], [0.0])
        loss = rift(batch, form="sequence_mean")
        assert loss.sum().item() == pytest.approx(0.1)
        assert gradient(loss, batch)[0] == pytest.approx([0.05, 0.05, 0])

    @pytest.mark.parametrize("form", ["token", "sequence_mean"])
    def test_a_long_wrong_rollout_does_not_vanish(self, form: str) -> None:
        """200 tokens at log π = −0.3: 0.2·e^−0.3 a token. The literal sequence probability leaves 0.2·e^−60 = 2e-27."""
        batch = scored([[math.exp(-0.3)] * 200], [0.0])
        literal = 0.2 * scored([[math.exp(-0.3)] * 200], [0.0]).logps.sum().exp()
        assert literal.item() < 1e-26
        assert gradient(rift(batch, form=form), batch)[0] == pytest.approx([0.2 * math.exp(-0.3)] * 200)

    def test_affine(self) -> None:
        """λ = ½: (1 − ½)·3·ln 2 + (1 + 0.1)·3·ln 2 = 4.8·ln 2: wrong rollouts are pulled up more than right ones."""
        batch = scored(*RIGHT_AND_WRONG)
        assert rift(batch, form="affine", affine_lambda=0.5).sum().item() == pytest.approx(4.8 * LN2)

    def test_naive(self) -> None:
        """3·ln 2 − 0.2·3·ln 2 = 2.4·ln 2, and no bound below as the wrong token's probability falls."""
        assert rift(scored(*RIGHT_AND_WRONG), form="naive").sum().item() == pytest.approx(2.4 * LN2)
        assert rift(scored([[1e-9]], [0.0]), form="naive").sum().item() < -4
        assert rift(scored([[1e-9]], [0.0])).sum().item() >= 0
        with pytest.warns(UserWarning, match="unbounded"):
            Rift(name="rift", form="naive")

    def test_options(self) -> None:
        for wrong in ({"form": "other"}, {"reward_right": -1}, {"reward_wrong": 0.5}, {"extra": 1}):
            with pytest.raises(ValidationError):
                Rift(name="rift", **wrong)


class TestGrpo:
    def test_advantages(self) -> None:
        """Group 0: rewards 1, 1, 0, 0, mean ½; group 1: all right; group 2: all wrong. b = 0.1."""
        reward = np.array([1, 1, 0, 0, 1, 1, 0, 0])
        group = np.array([0, 0, 0, 0, 1, 1, 2, 2])
        expected = [0.6, 0.6, -0.4, -0.4, 0.1, 0.1, 0.1, 0.1]
        assert group_advantages(reward, group).tolist() == pytest.approx(expected)
        only_right = [0.5, 0.5, -0.5, -0.5, 0.1, 0.1, 0, 0]
        assert group_advantages(reward, group, bias_scope="all_positive").tolist() == pytest.approx(only_right)

    def test_advantages_divided_by_the_spread(self) -> None:
        """Rewards 1, 0, 0, 0: mean ¼, population deviation √3/4, so √3 and −1/√3; a group without spread stays 0."""
        graded = group_advantages(np.full(6, 0.1), np.zeros(6), bias=0.0, std_norm=True)
        assert graded.tolist() == pytest.approx([0] * 6, abs=1e-12)
        values = group_advantages(np.array([1, 0, 0, 0, 1]), np.array([0, 0, 0, 0, 1]), bias=0.0, std_norm=True)
        assert values.tolist() == pytest.approx([math.sqrt(3), *([-1 / math.sqrt(3)] * 3), 0])

    def test_advantages_do_not_depend_on_the_order_of_rows(self) -> None:
        rng = np.random.default_rng(1)
        reward, group = rng.integers(0, 2, 40), rng.integers(0, 9, 40)
        order = rng.permutation(40)
        assert np.allclose(group_advantages(reward, group)[order], group_advantages(reward[order], group[order]))

    def test_loss(self) -> None:
        """0.6·3·ln 2 − 0.4·3·ln 2 = 0.6·ln 2. With a negative advantage the gradient is +0.4: log π falls."""
        batch = scored(*RIGHT_AND_WRONG, advantage=torch.tensor([0.6, -0.4], dtype=torch.float64))
        assert grpo(batch).sum().item() == pytest.approx(0.6 * LN2)
        assert gradient(grpo(batch), batch)[1][0] == pytest.approx(0.4)

    def test_prob_weight(self) -> None:
        """−0.6·(½ + ¼) + 0.4·⅛ = −0.4; the gradient is −Â·π, DFT's times the advantage."""
        batch = scored(*RIGHT_AND_WRONG, advantage=torch.tensor([0.6, -0.4], dtype=torch.float64))
        loss = grpo(batch, prob_weight=True)
        assert loss.sum().item() == pytest.approx(-0.4)
        assert gradient(loss, batch)[0] == pytest.approx([-0.3, -0.15])
        assert gradient(loss, batch)[1] == pytest.approx([0.05, 0])

    def test_kl(self) -> None:
        """π = ½, π_ref = ¼: d = −ln 2, e^d − d − 1 = ½ + ln 2 − 1; nothing where the two agree, or on padding."""
        reference = torch.tensor([[1 / 4, 1 / 4], [1 / 8, 1.0]], dtype=torch.float64).log()
        batch = scored(*RIGHT_AND_WRONG, reference_logps=reference)
        assert grpo(batch, kl_coef=2.0).sum().item() == pytest.approx(2 * (LN2 - 1 / 2))
        assert Grpo(name="grpo", kl_coef=2.0).needs_reference
        assert not Grpo(name="grpo").needs_reference


class TestDpo:
    def test_loss(self) -> None:
        """β = ½, margins (−1 + 3) − (−4 + 2) = 4: −ln σ(2) = ln(1 + e⁻²). No margin: ln 2."""
        values = [torch.tensor([float(x)]) for x in (-1, -4, -3, -2)]
        assert dpo(*values, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))
        assert dpo(*(torch.zeros(1),) * 4).item() == pytest.approx(LN2)

    def test_pairs(self) -> None:
        """Prompt a: right 0 and 3, wrong 1 and 2; b: all right; c: one of each, the wrong one first."""
        rollouts = pd.DataFrame({"problem_id": list("aaaabbcc"), "reward": [1, 0, 0, 1, 1, 1, 0, 1]})
        assert Dpo(name="dpo").pair_rows(rollouts) == [(0, 1), (7, 6)]
        assert Dpo(name="dpo", pairs="all").pair_rows(rollouts) == [(0, 1), (0, 2), (3, 1), (3, 2), (7, 6)]

    def test_refuses_rollouts_without_a_mixed_group(self) -> None:
        with pytest.raises(InputError, match="no mixed group"):
            Dpo(name="dpo").pair_rows(pd.DataFrame({"problem_id": ["a", "a", "b"], "reward": [1.0, 1.0, 0.0]}))


class TestRftRows:
    table = pd.DataFrame(
        {"problem_id": list("aaab"), "completion": ["x", "x", "y", "x"], "reward": [1.0, 1.0, 0.0, 1.0]},
        index=[5, 6, 7, 8],
    )

    def test_mask_keeps_every_row(self) -> None:
        assert Rft(name="rft").rows(self.table).equals(self.table)

    def test_filter_drops_wrong_rows(self) -> None:
        assert list(Rft(name="rft", wrong="filter").rows(self.table).index) == [5, 6, 8]

    def test_deduplicate_counts_a_prompts_solution_once(self) -> None:
        assert list(Rft(name="rft", wrong="filter", deduplicate=True).rows(self.table).index) == [5, 8]
        assert list(Rft(name="rft", deduplicate=True).rows(self.table)["reward"]) == [1, 0, 0, 1]

    def test_refuses_rollouts_without_a_right_one(self) -> None:
        with pytest.raises(InputError, match="no right one"):
            Rft(name="rft").rows(self.table.assign(reward=0.0))


@pytest.mark.parametrize("form", ["token", "sequence_mean", "affine", "naive"])
def test_padding_changes_no_loss(form: str) -> None:
    short = scored([[1 / 2, 1 / 4], [1 / 8, 1 / 2]], [1.0, 0.0], advantage=torch.tensor([0.6, -0.4]))
    padding = [[1 / 2, 1 / 4, 0, 0], [1 / 8, 1 / 2, 0, 0]]
    padded = scored(padding, [1.0, 0.0], advantage=torch.tensor([0.6, -0.4]))
    for loss in (sft, rft, dft, lambda s: rift(s, form=form), grpo, lambda s: grpo(s, prob_weight=True)):
        assert loss(short).sum().item() == pytest.approx(loss(padded).sum().item())
