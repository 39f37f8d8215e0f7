"""Losses on pairs: numbers derived by hand, formulas of their authors and of TRL, and limits."""

from __future__ import annotations

import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import logsigmoid
from trl.experimental.orpo import ORPOTrainer

from losslens.config.parse import build
from losslens.core.errors import InputError
from losslens.losses import Batch, Loss
from losslens.losses.cal_dpo import CalDpo
from losslens.losses.dpo import Dpo, LossType
from losslens.losses.ipo import Ipo
from losslens.losses.orpo import Orpo
from losslens.losses.rpo import Rpo
from tests.test_losses import PAIR, any_batch, batch_of, pull, total

pytestmark = pytest.mark.fast

DPO, SUMMED = Dpo(name="dpo"), Ipo(name="ipo", form="summed")


def example() -> Batch:
    """A pair with h_w = ln 1.25 over two tokens and h_l = −ln 2 over three; Δ = ln 2.5."""
    return batch_of(**PAIR, pairs=torch.tensor([[0, 1]]))


def dpo(loss_type: LossType, **options: Any) -> Dpo:
    """DPO of a loss type; `robust` warns that it is unbounded, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Dpo(name="dpo", loss_type=loss_type, **options)


@pytest.mark.parametrize(
    ("loss", "value", "chosen", "rejected"),
    [
        # −ln σ(ln 2.5) = ln 1.4 = .336472, and ½(4.776856² + 4.306853²) = 20.683669; σ(−Δ) = 1/3.5 = .285714, so
        # .285714 + 4.776856 and −.285714 − 4.306853.
        (CalDpo(name="cal_dpo"), 21.020142, 5.062571, -4.592567),
        # DPO's .648382, and −½·ln .4 = .458145; ½ is added to the weight of both chosen tokens.
        (Rpo(name="rpo"), 1.106527, 0.547711, -0.047711),
        # DPO's .648382 and a quarter of the likelihood.
        (Rpo(name="rpo", alpha=0.25), 0.762918, 0.172711, -0.047711),
        # (.342621 − 5)², as DPO's loss type.
        (Ipo(name="ipo"), 21.691181, 4.657379, -3.104919),
        # (.916291 − 5)² and 2·4.083709.
        (SUMMED, 16.676682, 8.167419, -8.167419),
        # e^{m_w} = √.4 = .632456 with the odds 1.720759, e^{m_l} = .1125^⅓ = .482745 with .933281; o = ln 1.843773 =
        # .611814; σ(−o) = .351645. .458145 + .1·ln(1 + 1/1.843773); ½ + .1·.351645/(2·.367544) and
        # −.1·.351645/(3·.517255).
        (Orpo(name="orpo"), 0.501477, 0.547837, -0.022661),
        (Orpo(name="orpo", odds_ratio_weight=0.0), 0.458145, 0.5, 0.0),
    ],
    ids=lambda value: value.name if isinstance(value, Loss) else None,
)
def test_losses_by_hand(loss: Loss, value: float, chosen: float, rejected: float) -> None:
    """On the pair of `example`, β = τ = .1."""
    assert loss.terms(example()).tolist() == pytest.approx([value], abs=1e-6)
    weights = pull(loss, example())
    assert weights[0] == pytest.approx([chosen, chosen, 0], abs=1e-6)
    assert weights[1] == pytest.approx([rejected] * 3, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "value", "chosen", "rejected"),
    [
        # β = 5 and d = .342621: ln(1 + e^−1.713104), and 5·σ(−1.713104) = .763808 over 2 and 3 tokens.
        (dpo("sigmoid_norm", beta=5.0), 0.165773, 0.381904, -0.254603),
        # −ln .505578 − ln .517321, and .1·.494422, −.1·.482679.
        (dpo("bco_pair"), 1.341143, 0.049442, -0.048268),
        # ε = .001, σ(u) = .522891: .522891·(ln .522891 − ln .999) + .477109·(ln .477109 − ln .001), and
        # .1·.249476·(ln 999 − .091629).
        (dpo("exo_pair"), 2.604175, 0.170021, -0.170021),
        # ε = .1: .648382 − .1/.8·.091629, and .1·(.477109 + .125).
        (dpo("robust"), 0.636929, 0.060211, -0.060211),
        # ε = .25: .648382 − ½·.091629, and .1·(.477109 + ½).
        (dpo("robust", label_smoothing=0.25), 0.602568, 0.097711, -0.097711),
    ],
    ids=["sigmoid_norm", "bco_pair", "exo_pair", "robust", "robust .25"],
)
def test_new_loss_types_of_dpo_by_hand(loss: Loss, value: float, chosen: float, rejected: float) -> None:
    test_losses_by_hand(loss, value, chosen, rejected)


def test_ld_dpo_by_hand() -> None:
    """The third rejected token is beyond the chosen one's length, and counts α.

    There h is 0 in the example, so that the margin is DPO's. With ρ = (.5, 1, .8) instead: h_l = −ln 2 + ½·ln .8 =
    −.804719, u = .1·(.223144 + .804719) = .102786, .1·σ(−u) = .047433, and half of it.
    """
    loss = Dpo(name="dpo", ld_alpha=0.5)
    assert pull(loss, example())[0] == pytest.approx([0.047711, 0.047711, 0], abs=1e-6)
    assert pull(loss, example())[1] == pytest.approx([-0.047711, -0.047711, -0.023855], abs=1e-6)
    reference = [PAIR["reference"][0], [0.5, 0.9, 0.625]]
    batch = batch_of(**{**PAIR, "reference": reference}, pairs=torch.tensor([[0, 1]]))
    assert loss.terms(batch).tolist() == pytest.approx([0.643074], abs=1e-6)
    assert pull(loss, batch)[1] == pytest.approx([-0.047433, -0.047433, -0.023716], abs=1e-6)


@pytest.mark.parametrize("loss_type", get_args(LossType))
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_weights_of_ld_dpo_equal_autograd(loss_type: LossType, alpha: float) -> None:
    loss = dpo(loss_type, ld_alpha=alpha)
    for seed in range(5):
        batch = any_batch(seed)
        found = loss.weights(batch).detach().where(batch.mask, 0)
        assert np.allclose(found, pull(loss, batch), rtol=1e-9, atol=1e-12)


# Formulas of others


def test_cal_dpo_equals_its_authors_formula() -> None:
    """Equals `dpo_loss` of tengxiao1/Cal-DPO, scripts/dpo_trainer.py, written out on log-probabilities."""
    batch, beta = any_batch(5), 0.2
    assert batch.reference is not None
    policy_chosen, policy_rejected = batch.split_pairs(batch.logps.sum(dim=1))
    reference_chosen, reference_rejected = batch.split_pairs(batch.reference.sum(dim=1))
    logits = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
    chosen_reward, rejected_reward = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    expected = -logsigmoid(logits)
    expected = expected + 0.5 * (chosen_reward - 1 / (2 * beta)) ** 2 + 0.5 * (rejected_reward + 1 / (2 * beta)) ** 2
    loss = CalDpo(name="cal_dpo", beta=beta)
    assert loss.terms(batch).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    [gradient] = torch.autograd.grad(expected.sum(), batch.logps)
    assert np.allclose(pull(loss, batch), (-gradient).where(batch.mask, 0), rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_orpo_equals_trl_in_its_odds_ratio(scale: float) -> None:
    """TRL returns +λ·log σ(o), in float32, of mean log-probabilities; the likelihood is its own term."""
    batch = any_batch(2, scale)
    chosen, rejected = batch.split_pairs(batch.logps.sum(dim=1) / batch.lengths)
    stub = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    odds, *_ = ORPOTrainer.odds_ratio_loss(stub, chosen, rejected)
    found = Orpo(name="orpo", odds_ratio_weight=0.3).terms(batch) + chosen
    assert found.tolist() == pytest.approx((-odds).tolist(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_orpo_near_probability_1(dtype: torch.dtype) -> None:
    """At m_w = −1e-6, the odds are 1e6; to m_w the loss is λ·ln(1 + odds_l·1e-6) and the weight λ·odds_l of both odds.

    With odds_l = 1: σ(−o)/(1 − e^{m_w}) = 1/(1 + 1e6)/1e-6 = .999999. A completion without tokens, m = 0, and one of
    probability 1 leave loss and gradient finite.
    """
    loss = Orpo(name="orpo")
    logps = torch.tensor([[-1e-6], [-np.log(2)]], dtype=dtype, requires_grad=True)
    batch = Batch(logps, torch.ones(2, 1, dtype=torch.bool), torch.tensor([1, 0]), pairs=torch.tensor([[0, 1]]))
    assert pull(loss, batch)[0] == pytest.approx([1 + 0.0999999], rel=1e-5)
    assert np.allclose(loss.weights(batch).detach(), pull(loss, batch), rtol=1e-5)
    for certain in ([[0.0], [-1.0]], [[-1.0], [0.0]], [[0.0], [0.0]]):
        logps = torch.tensor(certain, dtype=dtype, requires_grad=True)
        at_once = dataclasses.replace(batch, logps=logps)
        assert np.isfinite(total(loss, at_once).item())
        assert np.isfinite(pull(loss, at_once)).all()
        assert np.allclose(loss.weights(at_once).detach(), pull(loss, at_once))


# Limits


def same(first: Loss, second: Loss, batch: Batch, tolerance: float = 1e-12) -> bool:
    """True if both have the same terms and the same gradient."""
    values, gradients = zip(*((each.terms(batch).tolist(), pull(each, batch)) for each in (first, second)), strict=True)
    return np.allclose(*values, rtol=tolerance, atol=0) and np.allclose(*gradients, rtol=tolerance, atol=tolerance)


def cut_to(batch: Batch, tokens: int) -> Batch:
    """The batch with completions of exactly this length, in columns that all have tokens."""
    logps = torch.linspace(-2, -0.1, len(batch.logps) * tokens, dtype=torch.float64).reshape(-1, tokens)
    mask = torch.ones_like(logps, dtype=torch.bool)
    return dataclasses.replace(batch, logps=logps.requires_grad_(), mask=mask, reference=logps.detach().sin())


def test_limits() -> None:
    batch = any_batch(11)
    equal_lengths, one_token = cut_to(batch, 4), cut_to(batch, 1)
    assert same(Rpo(name="rpo", alpha=0.0), DPO, batch)
    assert not same(Rpo(name="rpo", alpha=0.01), DPO, batch)
    assert same(dpo("sigmoid_norm", beta=0.8), dpo("sigmoid", beta=0.2), equal_lengths)
    assert not same(dpo("sigmoid_norm", beta=0.8), dpo("sigmoid", beta=0.2), batch)
    assert same(Dpo(name="dpo", ld_alpha=1.0), DPO, batch)
    assert same(Dpo(name="dpo", ld_alpha=0.0), DPO, equal_lengths)
    assert not same(Dpo(name="dpo", ld_alpha=0.9), DPO, batch)
    assert same(dpo("robust", label_smoothing=1e-9), DPO, batch, 1e-7)
    assert not same(dpo("robust"), DPO, batch, 1e-7)
    assert same(Ipo(name="ipo", tau=0.3), dpo("ipo", beta=0.3), batch)
    assert same(Ipo(name="ipo"), SUMMED, one_token)
    assert not same(Ipo(name="ipo"), SUMMED, batch)


def test_discopop_starts_against_dpo() -> None:
    """At the base, its gradient points the opposite way to DPO's, whatever the pairs."""
    batch = any_batch(4)
    batch = dataclasses.replace(batch, reference=batch.logps.detach())
    ours, theirs = (np.ravel(pull(loss, batch)) for loss in (dpo("discopop"), DPO))
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) == pytest.approx(-1, abs=1e-12)


# Options


def test_robust_is_unbounded() -> None:
    assert not Dpo(name="dpo", loss_type="robust").bounded
    assert Dpo(name="dpo").bounded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing"),
        ({"loss_type": "exo_pair", "label_smoothing": 0.0}, "label_smoothing"),
        ({"ld_alpha": 1.5}, "ld_alpha"),
        ({"loss_type": "aot"}, "loss_type"),
    ],
)
def test_invalid_options_of_dpo(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        build("method", {"_target_": "losslens.losses.dpo.Dpo", "name": "dpo", **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Ipo, {"tau": 0}), (Ipo, {"form": "mean"}), (CalDpo, {"beta": -1}), (Rpo, {"alpha": -1}),
        (Orpo, {"odds_ratio_weight": -0.1}),
    ],
)  # fmt: skip
def test_invalid_options(kind: type[Loss], options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind(name=kind.model_fields["name"].annotation.__args__[0], **options)


def test_new_options_of_dpo_leave_its_identity() -> None:
    """Runs from before there were `label_smoothing` and `ld_alpha` keep their folder."""
    assert DPO.identity == {"version": 1, "name": "dpo"}
    assert Dpo(name="dpo", ld_alpha=0.5).identity == {"version": 1, "name": "dpo", "ld_alpha": 0.5}
