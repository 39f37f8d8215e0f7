"""Each loss against numbers derived by hand, and the options that change it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from trl.experimental.cpo import CPOTrainer

from losslens.losses import Batch, Loss, builtin_losses
from losslens.losses.dft import Dft
from losslens.losses.dpo import Dpo, LossType
from losslens.losses.grpo import Grpo, group_advantages
from losslens.losses.kto import Kto
from losslens.losses.nft import Nft
from losslens.losses.orpo import Orpo
from losslens.losses.p_alpha import PAlpha
from losslens.losses.ratio import RatioLoss
from losslens.losses.redi import Redi
from losslens.losses.rft import Rft
from losslens.losses.rift import Form, Rift
from losslens.losses.sft import Sft
from losslens.losses.simpo import SimPo

pytestmark = pytest.mark.fast

SFT, RFT, DFT, RIFT, GRPO = Sft(name="sft"), Rft(name="rft"), Dft(name="dft"), Rift(name="rift"), Grpo(name="grpo")


def batch_of(
    probabilities: list[list[float]],
    reward: list[float],
    advantage: list[float] | None = None,
    reference: list[list[float]] | None = None,
    **fields: Any,
) -> Batch:
    """Rollouts with these token probabilities, under the base too; 0 stands for padding."""

    def logps(values: torch.Tensor) -> torch.Tensor:
        return torch.where(values > 0, values.clamp(min=1e-12).log(), 0.0)

    values = torch.tensor(probabilities, dtype=torch.float64)
    if advantage is not None:
        fields["columns"] = {"advantage": torch.tensor(advantage, dtype=torch.float64)}
    if reference is not None:
        fields["reference"] = logps(torch.tensor(reference, dtype=torch.float64))
    return Batch(logps=logps(values).requires_grad_(), mask=values > 0, reward=torch.tensor(reward), **fields)


def total(loss: Loss, batch: Batch) -> torch.Tensor:
    """The sum of the terms where there is a token, as the trainer makes it."""
    terms = loss.terms(batch)
    assert (
        terms.shape
        == {"token": batch.logps.shape, "rollout": batch.reward.shape, "pair": (len(batch.reward) // 2,)}[loss.unit]
    )
    return (terms.where(batch.mask, 0) if loss.unit == "token" else terms).sum()


def pull(loss: Loss, batch: Batch) -> list[list[float]]:
    """w_t = −d loss / d log π_t by autograd, and 0 at padding."""
    [grad] = torch.autograd.grad(total(loss, batch), batch.logps, retain_graph=True)
    return (-grad).where(batch.mask, 0).tolist()


# A right rollout of two tokens (1/2, 1/4) and a wrong one of one token (1/8) with one position of padding.
RIGHT_AND_WRONG = ([[1 / 2, 1 / 4], [1 / 8, 0.0]], [1.0, 0.0])
LN2 = math.log(2)
# A right rollout and a wrong one whose tokens the base gives other probabilities: ρ = (5/4, 1) and (1/2, 1, 1).
PAIR: dict[str, Any] = {
    "probabilities": [[0.5, 0.8, 0.0], [0.25, 0.9, 0.5]],
    "reference": [[0.4, 0.8, 0.0], [0.5, 0.9, 0.5]],
    "reward": [1.0, 0.0],
    "advantage": [0.5, -0.5],
}


def test_sft() -> None:
    """−ln ½ − ln ¼ − ln ⅛ = (1 + 2 + 3)·ln 2: the wrong rollout counts like the right one."""
    batch = batch_of(*RIGHT_AND_WRONG)
    assert total(SFT, batch).item() == pytest.approx(6 * LN2)
    assert pull(SFT, batch) == [[1, 1], [1, 0]]


def test_rft() -> None:
    """−ln ½ − ln ¼ = 3·ln 2, and nothing from the wrong rollout."""
    batch = batch_of(*RIGHT_AND_WRONG)
    assert total(RFT, batch).item() == pytest.approx(3 * LN2)
    assert pull(RFT, batch)[1] == [0, 0]


def test_dft() -> None:
    """½·ln 2 + ¼·2·ln 2 + ⅛·3·ln 2 = 11/8·ln 2.

    With the stop-gradient w = π: ½, ¼, ⅛. Without it, it would be π(1 + ln π), which for π = ⅛ < 1/e is
    ⅛(1 − 3·ln 2) < 0: unlikely tokens would be pushed down.
    """
    batch = batch_of(*RIGHT_AND_WRONG)
    assert total(DFT, batch).item() == pytest.approx(11 / 8 * LN2)
    [[first, second], [third, _]] = pull(DFT, batch)
    assert (first, second, third) == pytest.approx((1 / 2, 1 / 4, 1 / 8))


@pytest.mark.parametrize(("alpha", "weights"), [(2, [0.25, 0.0625, 1 / 64]), (1, [0.5, 0.25, 0.125])])
def test_p_alpha(alpha: float, weights: list[float]) -> None:
    """α = 2: (1 − ¼)/2 + (1 − 1/16)/2 + (1 − 1/64)/2 = 171/128, w = π²; α = 1: ½ + ¾ + ⅞ with DFT's weights."""
    batch, loss = batch_of(*RIGHT_AND_WRONG), PAlpha(name="p_alpha", alpha=alpha)
    assert total(loss, batch).item() == pytest.approx({2: 171 / 128, 1: 17 / 8}[alpha])
    [[first, second], [third, _]] = pull(loss, batch)
    assert [first, second, third] == pytest.approx(weights)


def test_p_alpha_goes_from_sft_to_dft() -> None:
    batch = any_batch(7)
    assert np.allclose(pull(PAlpha(name="p_alpha", alpha=1), batch), pull(DFT, batch), rtol=1e-12)
    nearly = pull(PAlpha(name="p_alpha", alpha=1e-9), batch)
    assert np.allclose(nearly, pull(SFT, batch), atol=1e-6)


class TestRift:
    def test_token(self) -> None:
        """3·ln 2 from the right rollout, −(−0.2)·⅛ = 0.025 from the wrong one.

        The weight there is −0.2·π = −0.025: the wrong token is pushed down, by a negative DFT term.
        """
        batch = batch_of(*RIGHT_AND_WRONG)
        assert total(RIFT, batch).item() == pytest.approx(3 * LN2 + 0.025)
        assert pull(RIFT, batch)[1][0] == pytest.approx(-0.025)

    def test_sequence_mean(self) -> None:
        """A wrong rollout (½, ⅛): mean log π = −2·ln 2, so ¼; twice 0.2·¼, once for each token, is 0.1.

        d/d log π_t of 2·0.2·exp(mean) is 0.2·¼ = 0.05 for each of the two tokens.
        """
        batch = batch_of([[1 / 2, 1 / 8, 0.0]], [0.0])
        loss = Rift(name="rift", form="sequence_mean")
        assert total(loss, batch).item() == pytest.approx(0.1)
        assert pull(loss, batch)[0] == pytest.approx([-0.05, -0.05, 0])

    @pytest.mark.parametrize("form", ["token", "sequence_mean"])
    def test_long_incorrect_rollouts_keep_their_weight(self, form: Form) -> None:
        """200 tokens at log π = −0.3: 0.2·e^−0.3 a token. The literal sequence probability leaves 0.2·e^−60 = 2e-27."""
        batch = batch_of([[math.exp(-0.3)] * 200], [0.0])
        literal = 0.2 * batch_of([[math.exp(-0.3)] * 200], [0.0]).logps.sum().exp()
        assert literal.item() < 1e-26
        assert pull(Rift(name="rift", form=form), batch)[0] == pytest.approx([-0.2 * math.exp(-0.3)] * 200)

    def test_affine(self) -> None:
        """λ = ½: (1 − ½)·3·ln 2 + (1 + 0.1)·3·ln 2 = 4.8·ln 2: wrong rollouts are pulled up more than right ones."""
        batch = batch_of(*RIGHT_AND_WRONG)
        assert total(Rift(name="rift", form="affine", affine_lambda=0.5), batch).item() == pytest.approx(4.8 * LN2)

    def test_naive(self) -> None:
        """3·ln 2 − 0.2·3·ln 2 = 2.4·ln 2, and no bound below as the wrong token's probability falls."""
        naive = Rift(name="rift", form="naive")
        assert total(naive, batch_of(*RIGHT_AND_WRONG)).item() == pytest.approx(2.4 * LN2)
        assert total(naive, batch_of([[1e-9]], [0.0])).item() < -4
        assert total(RIFT, batch_of([[1e-9]], [0.0])).item() >= 0
        assert not naive.bounded
        assert RIFT.bounded

    def test_options(self) -> None:
        for wrong in ({"form": "other"}, {"reward_correct": -1}, {"reward_incorrect": 0.5}, {"extra": 1}):
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
        """−Σ Â·log π: 0.6·3·ln 2 − 0.4·3·ln 2 = 0.6·ln 2. With a negative advantage the weight is −0.4: log π falls."""
        batch = batch_of(*RIGHT_AND_WRONG, advantage=[0.6, -0.4])
        assert total(GRPO, batch).item() == pytest.approx(0.6 * LN2)
        assert pull(GRPO, batch)[1][0] == pytest.approx(-0.4)
        assert not GRPO.bounded

    def test_prob_weight(self) -> None:
        """−0.6·(½ + ¼) + 0.4·⅛ = −0.4; the weight is Â·π, DFT's times the advantage."""
        batch = batch_of(*RIGHT_AND_WRONG, advantage=[0.6, -0.4])
        loss = Grpo(name="grpo", weight_by="prob")
        assert total(loss, batch).item() == pytest.approx(-0.4)
        assert pull(loss, batch)[0] == pytest.approx([0.3, 0.15])
        assert pull(loss, batch)[1] == pytest.approx([-0.05, 0])
        assert loss.bounded

    def test_kl(self) -> None:
        """π = ½, π_ref = ¼: d = −ln 2, e^d − d − 1 = ½ + ln 2 − 1; nothing where the two agree, or on padding."""
        batch = batch_of(*RIGHT_AND_WRONG, reference=[[1 / 4, 1 / 4], [1 / 8, 1.0]], advantage=[0.0, 0.0])
        loss = Grpo(name="grpo", kl_coef=2.0)
        assert total(loss, batch).item() == pytest.approx(2 * (LN2 - 1 / 2))
        assert loss.needs == {"reference"}
        assert not GRPO.needs


class TestDpo:
    def test_loss(self) -> None:
        """β = ½, margins (−1 + 3) − (−4 + 2) = 4: −ln σ(2) = ln(1 + e⁻²). No margin: ln 2."""
        logps, reference = torch.tensor([[-1.0], [-4.0]]), torch.tensor([[-3.0], [-2.0]])
        facts = {
            "mask": torch.ones(2, 1, dtype=torch.bool),
            "reward": torch.tensor([1, 0]),
            "pairs": torch.tensor([[0, 1]]),
        }
        loss = Dpo(name="dpo", beta=0.5)
        assert loss.terms(Batch(logps=logps, reference=reference, **facts)).tolist() == pytest.approx(
            [math.log(1 + math.exp(-2))]
        )
        assert loss.terms(Batch(logps=logps, reference=logps, **facts)).tolist() == pytest.approx([LN2])

    @pytest.mark.parametrize(
        ("loss_type", "value", "chosen", "rejected"),
        [
            # u = ln 2.5 / 10 = .0916291: ln(1 + e^−u), and .1·σ(−u).
            ("sigmoid", 0.648382, 0.047711, -0.047711),
            # 1 − u, and β.
            ("hinge", 0.908371, 0.1, -0.1),
            # (ln 1.25 / 2 + ln 2 / 3 − 5)² = 4.657379²; 2·4.657379 over 2 and 3 tokens.
            ("ipo", 21.691181, 4.657379, -3.104919),
            # σ(±.0223144) = .505578, .494422; σ(−.0693147) = .482679.
            ("nca_pair", 1.363781, 0.024163, -0.024134),
            # (ln 1.25 − 5)² + (5 − ln 2)².
            ("sppo_hard", 41.367339, 9.553713, -8.613706),
            # 1 − .505578 + .482679; the weights are .1·σ(1 − σ).
            ("apo_zero", 0.977100, 0.024997, -0.024970),
            # .505578 + 1 − σ(u); s(u) = .249476 and s(.0223144) = .249969 nearly cancel for the chosen one.
            ("apo_down", 0.982687, -0.000049, -0.024948),
            # s = σ(u/.05) = .862074, s′ = 2.378044: (1 − s)·.648382 + s·.912443; the slope in u is
            # 2.378044·(.912443 − .648382) − .137926·.477109 − .862074·.912443 = −.224426.
            ("discopop", 0.876021, 0.022443, -0.022443),
        ],
    )
    def test_every_loss_type_on_one_pair(
        self, loss_type: LossType, value: float, chosen: float, rejected: float
    ) -> None:
        """h_w = ln 1.25 over two tokens, h_l = −ln 2 over three, β = .1."""
        batch = batch_of(**PAIR, pairs=torch.tensor([[0, 1]]))
        loss = Dpo(name="dpo", loss_type=loss_type)
        assert loss.terms(batch).tolist() == pytest.approx([value], abs=1e-6)
        weights = pull(loss, batch)
        assert weights[0] == pytest.approx([chosen, chosen, 0], abs=1e-6)
        assert weights[1] == pytest.approx([rejected] * 3, abs=1e-6)

    def test_discopop_initially_lowers_the_margin(self) -> None:
        """At the base, u = 0: s = ½, s′ = 5; slope 5·(1 − ln 2) − ½·½ − ½ = .784264, so w = −.0784264 on the chosen."""
        batch = batch_of([[0.5], [0.25]], [1.0, 0.0], reference=[[0.5], [0.25]], pairs=torch.tensor([[0, 1]]))
        loss = Dpo(name="dpo", loss_type="discopop")
        assert pull(loss, batch) == [[pytest.approx(-0.0784264, abs=1e-7)], [pytest.approx(0.0784264, abs=1e-7)]]

    def test_diagnostics_of_pairs(self) -> None:
        """Rewards are β·h: .0223144 and −.0693147; log-probabilities ln .4 and ln .1125."""
        found = Dpo(name="dpo").diagnostics(batch_of(**PAIR, pairs=torch.tensor([[0, 1]])))
        values = {name: value.item() for name, value in found.items()}
        assert values == pytest.approx(
            {
                "rewards/chosen": 0.0223144, "rewards/rejected": -0.0693147, "rewards/margins": 0.0916291,
                "rewards/accuracies": 1, "logps/chosen": math.log(0.4), "logps/rejected": math.log(0.1125),
            },
            abs=1e-7,
        )  # fmt: skip

    def test_pairs(self) -> None:
        """Prompt a: right 0 and 3, wrong 1 and 2; b: all right; c: one of each, the wrong one first."""
        rollouts = pd.DataFrame({"problem_id": list("aaaabbcc"), "reward": [1, 0, 0, 1, 1, 1, 0, 1]})
        assert Dpo(name="dpo").select_pairs(rollouts) == [(0, 1), (7, 6)]
        assert Dpo(name="dpo", pairs="all").select_pairs(rollouts) == [(0, 1), (0, 2), (3, 1), (3, 2), (7, 6)]

    def test_no_pairs_without_a_mixed_group(self) -> None:
        assert not Dpo(name="dpo").select_pairs(pd.DataFrame({"problem_id": list("aab"), "reward": [1.0, 1.0, 0.0]}))


class TestSimPo:
    pair = batch_of(**PAIR, pairs=torch.tensor([[0, 1]]))

    def test_by_hand(self) -> None:
        """m_w = ln .4 / 2 = −.458145, m_l = ln .1125 / 3 = −.728267; 2·.270121 − 1 = −.459758.

        ln(1 + e^.459758) = .949218; the weights are 2·σ(.459758) = 1.225913 over 2 and 3 tokens.
        """
        loss = SimPo(name="simpo")
        assert loss.terms(self.pair).tolist() == pytest.approx([0.949218], abs=1e-6)
        assert pull(loss, self.pair)[0] == pytest.approx([0.612956, 0.612956, 0], abs=1e-6)
        assert pull(loss, self.pair)[1] == pytest.approx([-0.408638] * 3, abs=1e-6)
        assert not loss.needs

    def test_equals_trl(self) -> None:
        """The loss that TRL's CPO makes of mean log-probabilities."""
        facts = {"beta": 2.0, "simpo_gamma": 1.0, "loss_type": "simpo", "label_smoothing": 0.0, "alpha": 0.0}
        stub = SimpleNamespace(**facts, accelerator=SimpleNamespace(device="cpu"))
        means = self.pair.split_pairs(self.pair.logps.sum(dim=1) / self.pair.lengths)
        losses, *_ = CPOTrainer.cpo_loss(stub, *means)
        assert losses.tolist() == pytest.approx(SimPo(name="simpo").terms(self.pair).tolist(), rel=1e-12)


class TestKto:
    @staticmethod
    def batch(usual: float) -> Batch:
        return batch_of(**PAIR, step={"mismatched_log_ratio": torch.tensor(usual, dtype=torch.float64)})

    def test_by_hand(self) -> None:
        """z₀ = .1: β(h − z₀) = .0123144 and −.0793147; 1 − σ(.0123144) = .496921, 1 − σ(.0793147) = .480182.

        The weights are ±.1·σ(1 − σ): .0249991 and −.0249607.
        """
        loss, batch = Kto(name="kto"), self.batch(0.1)
        assert loss.terms(batch).tolist() == pytest.approx([0.496921, 0.480182], abs=1e-6)
        assert pull(loss, batch)[0] == pytest.approx([0.0249991, 0.0249991, 0], abs=1e-7)
        assert pull(loss, batch)[1] == pytest.approx([-0.0249607] * 3, abs=1e-7)
        assert total(Kto(name="kto", undesirable_weight=3.0), batch).item() == pytest.approx(
            0.496921 + 3 * 0.480182, abs=5e-6
        )

    def test_z0_is_never_below_0(self) -> None:
        """With z₀ = 0 it is APO-zero, rollout by rollout."""
        loss, paired = Kto(name="kto"), batch_of(**PAIR, pairs=torch.tensor([[0, 1]]))
        apo = Dpo(name="dpo", loss_type="apo_zero")
        assert total(loss, self.batch(-5.0)).item() == pytest.approx(total(apo, paired).item())
        assert np.allclose(pull(loss, self.batch(-5.0)), pull(apo, paired))


class TestRftRows:
    table = pd.DataFrame(
        {"problem_id": list("aaab"), "completion": ["x", "x", "y", "x"], "reward": [1.0, 1.0, 0.0, 1.0]},
        index=[5, 6, 7, 8],
    )

    def test_mask_keeps_every_row(self) -> None:
        assert Rft(name="rft").select(self.table).equals(self.table)

    def test_drop_removes_incorrect_rows(self) -> None:
        assert list(Rft(name="rft", incorrect="drop").select(self.table).index) == [5, 6, 8]

    def test_deduplicate_counts_a_prompts_solution_once(self) -> None:
        assert list(Rft(name="rft", incorrect="drop", deduplicate=True).select(self.table).index) == [5, 8]
        assert list(Rft(name="rft", deduplicate=True).select(self.table)["reward"]) == [1, 0, 0, 1]


def _beside(kind: type[Loss], option: str) -> dict[str, Any]:
    """Options that do nothing without another: those of a ratio, and λ of the affine form."""
    if option == "affine_lambda":
        return {"form": "affine"}
    forms = {"epsilon_low": "clip", "epsilon_high": "clip", "behaviour": "clip", "ratio_max": "cispo"}
    return {"ratio": forms[option]} if issubclass(kind, RatioLoss) and option in forms else {}


def variants() -> dict[str, Loss]:
    """Every loss, and every value of its options that chooses among formulas."""
    found: dict[str, Loss] = {}
    for name, kind in builtin_losses().items():
        found[name] = kind(name=name)
        for option, about in kind.model_fields.items():
            if option == "name":
                continue
            values = get_args(about.annotation) or ((True,) if about.annotation is bool else (0.3, -0.3))
            for value in values:
                # A number may have to be positive.
                with contextlib.suppress(ValidationError):
                    if value != about.default:
                        found[f"{name} {option}={value}"] = kind(name=name, **{**_beside(kind, option), option: value})
    return found


_ROW = pd.DataFrame({"reward": [1.0], "group": [0], "completion_ids": [[1]]})
_COLUMNS = {name for loss in variants().values() for name in loss.columns(_ROW)}
_OF_DISTRIBUTIONS = ("top_entropy", "divergence")
each_variant = pytest.mark.parametrize("loss", variants().values(), ids=variants())


def any_batch(seed: int, scale: float = 1.0) -> Batch:
    """Four right and four wrong rollouts of up to five tokens, in pairs, and all that a loss may need."""
    rng = np.random.default_rng(seed)
    mask = np.arange(5) < rng.integers(1, 6, size=(8, 1))
    logps, reference = (torch.tensor(np.where(mask, -scale * rng.exponential(size=(8, 5)), 0.0)) for _ in "ab")
    others = {name: torch.tensor(mask * rng.exponential(size=(8, 5))) for name in ("sampler", *_OF_DISTRIBUTIONS)}
    return Batch(
        logps=logps.requires_grad_(),
        mask=torch.tensor(mask),
        reward=torch.tensor([1.0] * 4 + [0.0] * 4),
        columns={
            name: torch.tensor(rng.normal(size=8) if name == "advantage" else rng.uniform(0.02, 0.98, size=8))
            for name in sorted(_COLUMNS)
        },
        pairs=torch.arange(8).reshape(2, 4).T,
        reference=reference,
        step={"mismatched_log_ratio": torch.tensor(rng.exponential())},
        **{**others, "sampler": -others["sampler"]},
    )


AT_ZERO = {
    "rift reward_incorrect=0": Rift(name="rift", reward_incorrect=0.0),
    "rift naive reward_incorrect=0": Rift(name="rift", form="naive", reward_incorrect=0.0),
    "rift affine_lambda=2": Rift(name="rift", form="affine", affine_lambda=2.0),
    "nft negative_weight=0": Nft(name="nft", negative_weight=0.0),
    "orpo odds_ratio_weight=0": Orpo(name="orpo", odds_ratio_weight=0.0),
    "kto undesirable_weight=0": Kto(name="kto", undesirable_weight=0.0),
    "redi alpha=0": Redi(name="redi", alpha=0.0),
    "grpo cispo kl": Grpo(name="grpo", ratio="cispo", kl_coef=0.1),
    "grpo clip kl": Grpo(name="grpo", ratio="clip", kl_coef=0.1),
}


@pytest.mark.parametrize("loss", [*variants().values(), *AT_ZERO.values()], ids=[*variants(), *AT_ZERO])
def test_factors_are_those_of_the_weights(loss: Loss) -> None:
    """What a loss declares of its weights, its numbers show."""
    batch, about = any_batch(3), loss.factors
    assert about is not None
    wrong = batch.mask & (batch.reward == 0)[:, None]

    def weights(of: Batch) -> torch.Tensor:
        return loss.weights(of).detach().expand(of.mask.shape).where(of.mask, 0)

    found, moved = weights(batch), weights(dataclasses.replace(batch, logps=any_batch(3, scale=3.0).logps))
    rows = [row[mask] for table in (found, moved) for row, mask in zip(table, batch.mask, strict=True)]
    spread = max((row.max() - row.min()).item() for row in rows)
    assert (about.gate != "none") == (spread > 1e-12)
    assert (about.outcome == "correct only") == bool((found[wrong] == 0).all())
    assert about.outcome in ("signed", "relative") or bool((found >= 0).all())
    assert about.gate != "none" or (about.saturation != "none") == (not torch.allclose(found, moved))
    assert ("never" in about.stops) == (not loss.bounded)


@pytest.mark.slow
@each_variant
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_weights_equal_autograd(loss: Loss, seed: int, scale: float) -> None:
    batch = any_batch(seed, scale)
    [grad] = torch.autograd.grad(total(loss, batch), batch.logps)
    expected, found = (-grad).where(batch.mask, 0), loss.weights(batch).detach().where(batch.mask, 0)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_no_two_losses_have_the_same_weights() -> None:
    """An option that is silently ignored would make two of them one."""
    batches = [any_batch(seed) for seed in range(1, 9)]
    pulls = {name: np.array([pull(loss, batch) for batch in batches]) for name, loss in variants().items()}
    alike = {pair for pair in combinations(pulls, 2) if np.allclose(pulls[pair[0]], pulls[pair[1]], atol=1e-9)}
    # What decides which rollouts it learns from, or how their advantages are made, moves no weight of a given batch.
    # The batch holds the sampler's log-probabilities of either kind, and ASFT's divergence
    # is not of the sampled tokens' log-probabilities.
    elsewhere = ("incorrect=drop", "deduplicate", "pairs=", "bias", "std_norm")
    elsewhere += ("baseline", "beta1", "behaviour=sampler_raw", "asft")
    # One loss, under TRL's name and as a method of its own; and one on pairs and on single rollouts.
    explained = {("dpo loss_type=ipo", "ipo"), ("dpo loss_type=apo_zero", "kto z0=zero")}
    assert {pair for pair in alike if not any(word in name for word in elsewhere for name in pair)} == explained
    assert ("dpo", "dpo pairs=all") in alike


@pytest.mark.parametrize("loss", [loss for loss in variants().values() if loss.bounded], ids=repr)
def test_bounded_losses_are_bounded(loss: Loss) -> None:
    """Far out on both sides, where an unbounded one falls without end."""
    for seed, scale in product(range(20), (1.0, 1e2, 1e4)):
        batch = dataclasses.replace(any_batch(seed, scale), reference=any_batch(seed).reference)
        value = total(loss, batch).item()
        assert math.isfinite(value)
        assert value >= -400


def far(rows: list[list[float]], reference: float, **fields: Any) -> Batch:
    """Rollouts of one token in float32: log π of each, and the same of the base for all."""
    logps = torch.tensor(rows, requires_grad=True)
    mask = torch.ones(len(rows), 1, dtype=torch.bool)
    return Batch(logps, mask, torch.tensor([1.0, 0.0]), reference=torch.full((len(rows), 1), reference), **fields)


def test_clipped_ratios_do_not_overflow() -> None:
    """log ρ = 89.9, whose e^ is infinite in float32: −min(ρ, 1.2) = −1.2 without gradient; RFT's wrong rollout 0.

    With Â = −½ the ratio is held at e^20: the term is e^20/2, without gradient.
    """
    batch = far([[-0.1], [-0.1]], -90.0, columns={"advantage": torch.tensor([0.5, -0.5])})
    losses = (
        (Sft(name="sft", ratio="clip", behaviour="base"), [-1.2, -1.2]),
        (Rft(name="rft", ratio="clip", behaviour="base"), [-1.2, 0.0]),
        (Grpo(name="grpo", ratio="clip", behaviour="base"), [-0.6, math.exp(20) / 2]),
    )
    for loss, terms in losses:
        assert loss.terms(batch)[:, 0].tolist() == pytest.approx(terms)
        assert pull(loss, batch) == loss.weights(batch).tolist() == [[0.0], [0.0]]
        assert all(values.isfinite().all() for values in loss.diagnostics(batch).values())


def test_discopop_does_not_overflow() -> None:
    """u = .1·(−899 − 1) = −90: s = 0 and e^90 is infinite in float32; −log σ(−90) = 90, w = ±β·σ(90) = ±.1."""
    batch = far([[-900.0], [0.0]], -1.0, pairs=torch.tensor([[0, 1]]))
    loss = Dpo(name="dpo", loss_type="discopop")
    assert loss.terms(batch).item() == pytest.approx(90)
    assert [w for [w] in pull(loss, batch)] == pytest.approx([0.1, -0.1])
    assert loss.weights(batch)[:, 0].tolist() == pytest.approx([0.1, -0.1])


def test_kl_term_does_not_overflow() -> None:
    """d = 99 in float32: .1·(e^80·(1 + 19) − 99 − 1), with the weight .1·(e^80 − 1) added to Â = ½ and −½."""
    batch = far([[-100.0], [-100.0]], -1.0, columns={"advantage": torch.tensor([0.5, -0.5])})
    loss = Grpo(name="grpo", kl_coef=0.1)
    assert loss.terms(batch)[:, 0].tolist() == pytest.approx([2 * math.exp(80)] * 2)
    assert [w for [w] in pull(loss, batch)] == pytest.approx([0.1 * math.exp(80)] * 2)
    assert loss.weights(batch)[:, 0].tolist() == pytest.approx([0.1 * math.exp(80)] * 2)


@each_variant
def test_padding_changes_no_loss(loss: Loss) -> None:
    batch = any_batch(3)
    names = ("logps", "mask", "reference", "sampler", *_OF_DISTRIBUTIONS)
    wider = {name: torch.nn.functional.pad(getattr(batch, name), (0, 3)) for name in names}
    assert total(loss, dataclasses.replace(batch, **wider)).item() == pytest.approx(total(loss, batch).item())


@pytest.mark.parametrize("kind", builtin_losses().values(), ids=builtin_losses())
def test_every_loss_has_a_presentation(kind: type[Loss]) -> None:
    assert kind.title
    assert kind.summary.endswith(".")
    assert re.fullmatch(r"#[0-9a-f]{6}", kind.colour)
    assert kind.place < float("inf")
    assert kind.__doc__
