"""Losses on single rollouts against numbers derived by hand, their limits, and independent formulas.

`PAIR` has ratios (5/4, 1) in its correct rollout and (1/2, 1, 1) in its incorrect one, r̄ = ½; before any division.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from trl import GRPOTrainer
from trl.experimental.a2po import A2POTrainer

from losslens.config.parse import build
from losslens.core.errors import InputError
from losslens.core.notices import print_once
from losslens.losses import Batch, Loss
from losslens.losses.a_star_po import AStarPo
from losslens.losses.asft import Asft
from losslens.losses.awr import Awr
from losslens.losses.dft import Dft
from losslens.losses.dpo import Dpo
from losslens.losses.eaft import Eaft
from losslens.losses.grpo import Grpo
from losslens.losses.kto import Kto
from losslens.losses.nft import Nft
from losslens.losses.ratio import Behaviour
from losslens.losses.redi import Redi
from losslens.losses.rft import Rft
from losslens.losses.sft import Sft
from losslens.losses.topr import Topr
from losslens.pipeline.prepare import _note_unbounded
from tests.test_losses import PAIR, any_batch, batch_of, pull, total

pytestmark = pytest.mark.fast

SFT, RFT = Sft(name="sft"), Rft(name="rft")
GROUP = pd.DataFrame({"reward": [1.0, 0.0], "group": [0, 0], "completion_ids": [[1, 2], [1, 2, 3]]})


def example(loss: Loss, group: pd.DataFrame = GROUP, **fields: Any) -> Batch:
    """`PAIR` with the loss's own columns; the sampler is the base."""
    facts = {name: value for name, value in PAIR.items() if name != "advantage"}
    batch = batch_of(**facts, **fields)
    columns = {name: torch.tensor(values) for name, values in loss.columns(group).items()}
    return Batch(**{**vars(batch), "columns": columns, "sampler": batch.reference})


def at_the_base(loss: Loss, seed: int) -> Batch:
    """Random rollouts of two prompts of four, whose probabilities are those of the base and of the sampler."""
    batch = any_batch(seed)
    lengths = batch.mask.sum(dim=1).tolist()
    completions = [[0] * length for length in lengths]
    group = pd.DataFrame({"reward": batch.reward, "group": [0, 0, 0, 1] * 2, "completion_ids": completions})
    columns = {name: torch.tensor(values) for name, values in loss.columns(group).items()}
    base = batch.logps.detach()
    return Batch(**{**vars(batch), "columns": columns, "reference": base, "sampler": base})


def proportional(one: Any, other: Any) -> bool:
    one, other = np.ravel(one), np.ravel(other)
    return bool(np.isclose(one @ other, np.linalg.norm(one) * np.linalg.norm(other), rtol=1e-9))


def check(loss: Loss, batch: Batch, value: float, correct: list[float], incorrect: list[float]) -> None:
    """The sum of the terms, and the weights of two and three tokens."""
    assert total(loss, batch).item() == pytest.approx(value, abs=2e-6)
    weights = pull(loss, batch)
    assert weights[0] == pytest.approx([*correct, 0], abs=1e-6)
    assert weights[1] == pytest.approx(incorrect, abs=1e-6)


class TestRatio:
    """ρ = (1.25, 1 | .5, 1, 1)."""

    def test_clipped_sft(self) -> None:
        """−(min(1.25, 1.2) + 1 + .5 + 1 + 1) = −4.7; with ε = .28 nothing is clipped: −4.75."""
        loss = Sft(name="sft", ratio="clip")
        check(loss, example(loss), -4.7, [0, 1], [0.5, 1, 1])
        wide = Sft(name="sft", ratio="clip", epsilon_high=0.28)
        check(wide, example(wide), -4.75, [1.25, 1], [0.5, 1, 1])
        clipped = loss.diagnostics(example(loss))["ratio/clipped"]
        assert clipped.tolist() == [1, 0, 0, 0, 0]

    def test_clipped_rft(self) -> None:
        """−(1.2 + 1), and nothing from the incorrect rollout."""
        loss = Rft(name="rft", ratio="clip")
        check(loss, example(loss), -2.2, [0, 1], [0, 0, 0])

    def test_clipped_grpo(self) -> None:
        """Â = ±½: −½·(1.2 + 1) + ½·(max(.5, .8) + 1 + 1) = .3: the most likely and the least likely token are out."""
        loss = Grpo(name="grpo", bias=0, ratio="clip")
        check(loss, example(loss), 0.3, [0, 0.5], [0, -0.5, -0.5])
        assert loss.diagnostics(example(loss))["ratio/clipped"].tolist() == [1, 0, 1, 0, 0]
        low = Grpo(name="grpo", bias=0, ratio="clip", epsilon_low=0.6)
        check(low, example(low), 0.15, [0, 0.5], [-0.25, -0.5, -0.5])

    def test_cispo(self) -> None:
        """−½·(1.25·ln .5 + ln .8) + ½·(.5·ln .25 + ln .9 + ln .5) = −.201039; with c = 1, 1.25 becomes 1: −.287682."""
        loss = Grpo(name="grpo", bias=0, ratio="cispo")
        check(loss, example(loss), -0.201039, [0.625, 0.5], [-0.25, -0.5, -0.5])
        low = Grpo(name="grpo", bias=0, ratio="cispo", ratio_max=1)
        check(low, example(low), -0.287682, [0.5, 0.5], [-0.25, -0.5, -0.5])
        assert low.diagnostics(example(low))["ratio/clipped"].tolist() == [1, 0, 0, 0, 0]
        sft = Sft(name="sft", ratio="cispo")
        assert pull(sft, example(sft))[0] == pytest.approx([1.25, 1, 0])

    @pytest.mark.parametrize("ratio", ["clip", "cispo"])
    @pytest.mark.parametrize("kind", [Sft, Rft, Grpo])
    def test_where_the_ratio_is_1_it_changes_no_weight(self, kind: Any, ratio: str) -> None:
        plain = kind(name=kind.__name__.lower())
        loss = kind(name=plain.name, ratio=ratio)
        batch = at_the_base(loss, 3)
        assert np.allclose(pull(loss, batch), pull(plain, batch), rtol=1e-12)

    def test_what_it_divides_by(self) -> None:
        """The base only if chosen; without a ratio nothing."""
        needs: dict[Behaviour, str] = {"sampler": "sampler", "sampler_raw": "sampler_raw", "base": "reference"}
        for behaviour, need in needs.items():
            for kind, name in ((Sft, "sft"), (Rft, "rft"), (Grpo, "grpo")):
                assert not kind(name=name, behaviour=behaviour).needs
                assert kind(name=name, ratio="clip", behaviour=behaviour).needs == {need}
            assert Nft(name="nft", behaviour=behaviour).needs == Topr(name="topr", behaviour=behaviour).needs == {need}
        both = Grpo(name="grpo", ratio="clip", kl_coef=0.1)
        assert both.needs == {"sampler", "reference"}
        other = Batch(**{**vars(example(SFT)), "sampler": None})
        assert pull(Sft(name="sft", ratio="clip", behaviour="base"), other)[0] == pytest.approx([0, 1, 0])

    def test_two_gates_are_refused(self) -> None:
        options = {"name": "grpo", "weight_by": "prob", "ratio": "clip"}
        with pytest.raises(InputError) as refusal:
            build("method", {"_target_": "losslens.losses.grpo.Grpo", **options})
        assert str(refusal.value) == "method: weight_by=prob cannot be combined with ratio=clip"


class TestNormaliser:
    def divided(self, loss: Grpo) -> list[float]:
        """The weights after the division, by 5 tokens or 2 rollouts."""
        weights = pull(loss, example(loss))
        by = {"tokens": 5, "rollouts": 2}[loss.divisor]
        return [weight / by for weight in (*weights[0][:2], *weights[1])]

    def test_by_hand(self) -> None:
        """Â·ρ = .625, .5 | −.25, −.5, −.5: over 5 tokens; over 2 and 3, then 2; over 2·3, the longest having 3."""
        options: dict[str, Any] = {"name": "grpo", "bias": 0, "ratio": "cispo"}
        tokens, sequence, constant = (
            self.divided(Grpo(**options, normaliser=normaliser)) for normaliser in ("tokens", "sequence", "constant")
        )
        assert tokens == pytest.approx([0.125, 0.1, -0.05, -0.1, -0.1])
        assert sequence == pytest.approx([0.15625, 0.125, -0.0416667, -0.0833333, -0.0833333], abs=1e-7)
        assert constant == pytest.approx([weight / 6 for weight in (0.625, 0.5, -0.25, -0.5, -0.5)])

    def test_the_kl_term_is_divided_too(self) -> None:
        """d = −ln 1.25 and ln 2: β(e^d − 1) = −.2 and 1 with β = 1; over the two and the three tokens."""
        loss = Grpo(name="grpo", bias=0, kl_coef=1, normaliser="sequence")
        weights = pull(loss, example(loss))
        assert weights[0] == pytest.approx([(0.5 - 0.2) / 2, 0.5 / 2, 0])
        assert weights[1] == pytest.approx([(-0.5 + 1) / 3, -0.5 / 3, -0.5 / 3])

    def test_the_longest_completion_is_that_of_the_selected_rollouts(self) -> None:
        loss = Grpo(name="grpo", normaliser="constant")
        assert loss.columns(GROUP)["longest"].tolist() == [3, 3]
        assert loss.columns(GROUP.iloc[:1])["longest"].tolist() == [2]
        assert loss.columns(GROUP.assign(completion_ids=[[], []]))["longest"].tolist() == [1, 1]


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_grpo_equals_trl(loss_type: str) -> None:
    """Its loss of the same log-probabilities, with its names of the normalisers; `cispo` divides by the tokens."""
    ratio: Literal["clip", "cispo"] = "cispo" if loss_type == "cispo" else "clip"
    normaliser = {"grpo": "sequence", "dr_grpo": "constant"}.get(loss_type, "tokens")
    loss = Grpo(name="grpo", ratio=ratio, ratio_max=1.1, epsilon_high=0.3, normaliser=normaliser)  # type: ignore[arg-type]
    batch = any_batch(4)
    longest = torch.full((8,), 7.0)
    batch = Batch(**{**vars(batch), "columns": {**batch.columns, "longest": longest}})
    args = SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False)
    stub: Any = SimpleNamespace(
        args=args, model=SimpleNamespace(training=True), accelerator=_alone(), loss_type=loss_type, beta=0.0,
        epsilon_low=0.2, epsilon_high=1.1 if ratio == "cispo" else 0.3, importance_sampling_level="token",
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False, use_vllm=False,
        _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1, max_completion_length=7,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logps, torch.zeros(8, 5), None),
    )  # fmt: skip
    tokens = torch.zeros(8, 5, dtype=torch.long)
    inputs = {
        "prompt_ids": tokens, "prompt_mask": tokens, "completion_ids": tokens, "completion_mask": batch.mask.long(),
        "advantages": batch.columns["advantage"], "old_per_token_logps": batch.sampler,
        "num_items_in_batch": batch.mask.sum(),
    }  # fmt: skip
    theirs = GRPOTrainer._compute_loss(stub, None, inputs)
    count = batch.mask.sum() if loss.divisor == "tokens" else len(batch.reward)
    ours = total(loss, batch) / count
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    wanted, found = (torch.autograd.grad(value, batch.logps)[0] for value in (theirs, ours))
    assert torch.allclose(found, wanted, rtol=1e-12)
    clipped = loss.diagnostics(batch)["ratio/clipped"].mean().item()
    if ratio == "clip":
        assert clipped == pytest.approx(stub._metrics["train"]["clip_ratio/region_mean"][0])
        assert 0 < clipped < 1


def _alone() -> Any:
    """An accelerator of one process."""
    return SimpleNamespace(num_processes=1, gather=lambda values: values, reduce=lambda values, reduction: values)


class TestAwr:
    def test_by_hand(self) -> None:
        """β = ½, Â = ±½: e and 1/e, times −ln .4 and −ln .1125: 2.490737 + .803744."""
        loss = Awr(name="awr", beta=0.5)
        check(loss, example(loss), 3.294481, [math.e] * 2, [1 / math.e] * 3)

    def test_rwr(self) -> None:
        """e^(1/β) = e² and 1; the cap of 5 holds the first."""
        loss = Awr(name="awr", beta=0.5, baseline="none")
        assert pull(loss, example(loss))[0] == pytest.approx([math.exp(2), math.exp(2), 0])
        assert pull(loss, example(loss))[1] == pytest.approx([1, 1, 1])
        low = Awr(name="awr", beta=0.5, baseline="none", cap=5)
        assert pull(low, example(low))[0] == pytest.approx([5, 5, 0])

    def test_limits(self) -> None:
        """β → ∞ is SFT; RWR without the cap and β → 0 is RFT up to scale."""
        far = Awr(name="awr", beta=1e9)
        assert np.allclose(pull(far, at_the_base(far, 1)), pull(SFT, at_the_base(SFT, 1)), rtol=1e-8)
        near = Awr(name="awr", beta=0.03, baseline="none", cap=1e30)
        assert proportional(pull(near, at_the_base(near, 1)), pull(RFT, at_the_base(RFT, 1)))


def test_eaft() -> None:
    """H/3 = (.2333, .1333 | .0667, .1, .3), times −log π: .191486 + .310900. α = 2 squares the weights."""
    entropy = torch.tensor([[0.7, 0.4, 0.0], [0.2, 0.3, 0.9]], dtype=torch.float64)
    loss = Eaft(name="eaft")
    check(loss, example(loss, top_entropy=entropy), 0.502386, [0.233333, 0.133333], [0.066667, 0.1, 0.3])
    squared = Eaft(name="eaft", alpha=2)
    assert pull(squared, example(squared, top_entropy=entropy))[1] == pytest.approx([0.2**2 / 9, 0.01, 0.09])
    assert loss.needs == {"top_entropy"}


def test_asft() -> None:
    """DFT's .525089 + .787973, and λ = ½ times .2 + .3 + .1; the divergence's own gradient is handed on."""
    divergence = torch.tensor([[0.2, 0.3, 0.0], [0.1, 0.0, 0.0]], dtype=torch.float64).requires_grad_()
    loss = Asft(name="asft", kl_coef=0.5)
    batch = example(loss, divergence=divergence)
    check(loss, batch, 1.313060 + 0.3, [0.5, 0.8], [0.25, 0.9, 0.5])
    [slope] = torch.autograd.grad(total(loss, batch), divergence)
    assert slope.where(batch.mask, 0).tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0.5]]
    assert loss.diagnostics(batch)["divergence"].tolist() == [0.2, 0.3, 0.1, 0, 0]
    without = Asft(name="asft", kl_coef=0)
    assert not without.needs
    batch = any_batch(2)
    assert torch.equal(without.terms(batch), Dft(name="dft").terms(batch))


class TestNft:
    def test_by_hand(self) -> None:
        """q = (1 − ρ/2)/½ = 1.5, 1, 1: −½·ln 1.25 − ½·ln 1.5; w = ½ | −½ρ/q."""
        loss = Nft(name="nft")
        check(loss, example(loss), -0.314304, [0.5, 0.5], [-1 / 6, -0.5, -0.5])

    def test_bounds_of_the_denominator(self) -> None:
        """r̄ = ¾, ρ = 1.3: q = .1, so that w = −¾·1.3/.1; with ε = 1 a tenth of it, and the value is −¼·ln 1."""
        facts: dict[str, Any] = {"probabilities": [[0.65]], "reward": [0.0], "reference": [[0.5]]}
        batch = batch_of(**facts, columns={"pass_rate": torch.tensor([0.75], dtype=torch.float64)})
        low = Nft(name="nft", behaviour="base", epsilon=1e-6)
        assert pull(low, batch)[0] == pytest.approx([-9.75])
        assert total(low, batch).item() == pytest.approx(-0.25 * math.log(0.1))
        assert pull(Nft(name="nft", behaviour="base"), batch)[0] == pytest.approx([-0.975])
        assert total(Nft(name="nft", behaviour="base"), batch).item() == 0

    def test_groups_without_both_outcomes_do_not_count(self) -> None:
        table = pd.DataFrame({"reward": [1.0, 1, 0, 0, 1, 0, 0], "group": [0, 0, 1, 1, 2, 2, 2]})
        loss = Nft(name="nft")
        rates = loss.columns(table)["pass_rate"]
        assert rates.tolist() == pytest.approx([1, 1, 0, 0, 1 / 3, 1 / 3, 1 / 3])
        values = [[0.5]] * 7
        batch = batch_of(values, table["reward"].tolist(), reference=values, columns={"pass_rate": torch.tensor(rates)})
        weights = np.ravel(pull(Nft(name="nft", behaviour="base"), batch))
        assert weights.tolist() == pytest.approx([0, 0, 0, 0, 2 / 3, -1 / 3, -1 / 3])

    def test_at_the_base_it_is_grpo(self) -> None:
        """ω = 1 − r̄ without, ω = √((1 − r̄)/r̄) with the division by the group's deviation."""
        for weight, divided in (("dr_grpo", False), ("grpo", True)):
            loss = Nft(name="nft", group_weight=weight)  # type: ignore[arg-type]
            grpo = Grpo(name="grpo", bias=0, std_norm=divided)
            assert np.allclose(pull(loss, at_the_base(loss, 5)), pull(grpo, at_the_base(grpo, 5)), rtol=1e-9)

    @pytest.mark.parametrize("normalize", [0, 1, 2])
    def test_equals_the_authors_formula(self, normalize: int) -> None:
        """As their actor computes it, from their names: the loss and its gradient, before their division by 1000."""
        loss = Nft(
            name="nft",
            group_weight=("none", "dr_grpo", "grpo")[normalize],  # type: ignore[arg-type]
            epsilon=0.7,
            negative_weight=0.6,
        )
        batch = any_batch(6)
        assert batch.sampler is not None
        logps = batch.logps.detach().requires_grad_()
        ratio = (logps - batch.sampler).clamp(max=10.0).exp()
        correct_rate = batch.columns["pass_rate"].clamp(min=0.02, max=0.98)[:, None]
        proxy = (1.0 - correct_rate * ratio) / (1.0 - correct_rate)
        proxy = proxy + (proxy.clamp(min=0.7) - proxy).detach()
        right = batch.reward.double()[:, None]
        losses = -proxy.log() * (1 - right) * 0.6 - ratio.log() * right
        if normalize == 1:
            losses = losses * (1.0 - correct_rate)
        elif normalize == 2:
            losses = losses * ((1.0 - correct_rate) / correct_rate) ** 0.5
        theirs = (losses * batch.mask).sum()
        [wanted] = torch.autograd.grad(theirs, logps)
        assert total(loss, batch).item() == pytest.approx(theirs.item(), rel=1e-12)
        assert np.allclose(pull(loss, batch), -wanted, rtol=1e-9)


class TestTopr:
    def test_by_hand(self) -> None:
        """e^h = ½ for the incorrect rollout: −ln .4 + ½·ln .1125 = −.176110; per token 2^(−1/3) = .793701."""
        loss = Topr(name="topr")
        check(loss, example(loss), -0.176110, [1, 1], [-0.5] * 3)
        geometric = Topr(name="topr", level="geometric")
        assert pull(geometric, example(geometric))[1] == pytest.approx([-0.793701] * 3, abs=1e-6)
        assert loss.diagnostics(example(loss))["taper/incorrect"].tolist() == pytest.approx([0.5])

    def test_a_likelier_incorrect_rollout_counts_once(self) -> None:
        batch = batch_of([[0.5, 0.9]], [0.0], reference=[[0.1, 0.3]])
        assert pull(Topr(name="topr", behaviour="base"), batch)[0] == pytest.approx([-1, -1])

    def test_without_incorrect_rollouts_it_is_rft(self) -> None:
        batch = any_batch(1)
        correct = Batch(**{**vars(batch), "reward": torch.ones(8)})
        assert pull(Topr(name="topr"), correct) == pull(RFT, correct)
        assert not Topr(name="topr").diagnostics(correct)["taper/incorrect"].numel()


class TestRedi:
    def test_by_hand(self) -> None:
        """−ln .4/2 + .8·ln .1125/3 = .458145 − .582614; w = ½ | −.8/3."""
        loss = Redi(name="redi")
        check(loss, example(loss), -0.124469, [0.5, 0.5], [-0.266667] * 3)
        assert not loss.bounded
        assert Redi(name="redi", alpha=0).bounded

    def test_without_incorrect_rollouts_it_is_rft_by_rollout(self) -> None:
        batch = any_batch(8)
        wanted = np.array(pull(RFT, batch)) / batch.lengths.numpy()[:, None]
        assert np.allclose(pull(Redi(name="redi", alpha=0), batch), wanted, rtol=1e-12)


class TestAStarPo:
    def test_by_hand(self) -> None:
        """V* = ½·ln((e² + 1)/2) = .716890; β₂ = .1: (.022314 − .283110)² + (−.069315 + .716890)² = .487368."""
        loss = AStarPo(name="a_star_po", beta2=0.1)
        check(loss, example(loss), 0.487368, [0.052159] * 2, [-0.129515] * 3)
        default = AStarPo(name="a_star_po")
        assert pull(default, example(default))[0] == pytest.approx([0.000566, 0.000566, 0], abs=5e-7)
        assert pull(default, example(default))[1] == pytest.approx([-0.001432] * 3, abs=5e-7)

    @pytest.mark.parametrize("beta1", [1e-3, 0.03, 0.5, 2.0, 1e6])
    def test_optimal_values(self, beta1: float) -> None:
        """β₁·log mean e^(r/β₁), between the largest reward and the mean; 0 where no rollout is correct."""
        table = pd.DataFrame({"reward": [1.0, 0, 0, 0, 0, 0, 1, 1], "group": [0, 0, 0, 0, 1, 1, 2, 2]})
        values = AStarPo(name="a_star_po", beta1=beta1).columns(table)["optimal_value"]
        wanted = beta1 * (torch.tensor([1.0, 0, 0, 0]).double() / beta1).logsumexp(0) - beta1 * math.log(4)
        assert values.tolist() == pytest.approx([wanted.item()] * 4 + [0] * 2 + [1] * 2, abs=1e-9)

    def test_prompts_without_a_correct_rollout_do_not_count(self) -> None:
        loss = AStarPo(name="a_star_po")
        table = GROUP.assign(group=[0, 1])
        check(loss, example(loss, table), (0.001 * math.log(1.25)) ** 2, [-4.5e-7] * 2, [0] * 3)

    def test_at_the_base_it_is_grpo(self) -> None:
        """With β₁ → ∞ the optimal value is the pass rate."""
        loss, grpo = AStarPo(name="a_star_po", beta1=1e7), Grpo(name="grpo", bias=0)
        assert proportional(pull(loss, at_the_base(loss, 2)), pull(grpo, at_the_base(grpo, 2)))

    def test_equals_trl(self) -> None:
        """Its loss of the same log-probabilities: a mean over rollouts."""
        loss, batch = AStarPo(name="a_star_po", beta2=0.05), any_batch(9)
        assert batch.reference is not None
        stub: Any = SimpleNamespace(
            model=SimpleNamespace(training=True), args=SimpleNamespace(beta2=0.05),
            _get_sequence_logps=lambda *_: batch.logps.sum(dim=1), _metrics=defaultdict(lambda: defaultdict(list)),
        )  # fmt: skip
        inputs = {"ref_logps": batch.reference.sum(dim=1), "rewards": batch.reward}
        inputs |= {"v_star": batch.columns["optimal_value"]}
        inputs |= dict.fromkeys(("input_ids", "attention_mask", "logits_to_keep"))
        theirs = A2POTrainer.compute_loss(stub, None, inputs)
        assert total(loss, batch).item() / 8 == pytest.approx(theirs.item(), rel=1e-12)


def test_kto_with_z0_fixed_is_apo_zero() -> None:
    loss, batch = Kto(name="kto", z0="zero"), any_batch(3)
    without = Batch(**{**vars(batch), "step": {}})
    apo = Dpo(name="dpo", loss_type="apo_zero")
    assert np.allclose(pull(loss, without), pull(apo, batch), rtol=1e-12)
    # Each rollout's term: 1 − σ(βh) or σ(βh).
    terms, h = loss.terms(without), 0.1 * batch.log_ratio
    assert torch.allclose(terms[:4] + terms[4:], apo.terms(batch))
    assert torch.allclose(terms, torch.where(batch.correct, 1 - h.sigmoid(), h.sigmoid()))
    assert loss.needs == {"reference"}
    assert not loss.diagnostics(without)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Awr, {"beta": 0}), (Awr, {"cap": 0}), (Eaft, {"alpha": 0}), (Asft, {"kl_coef": -1}), (Nft, {"epsilon": 0}),
        (Nft, {"negative_weight": -1}), (Topr, {"level": "token"}), (Redi, {"alpha": -0.1}), (AStarPo, {"beta1": 0}),
        (Sft, {"ratio": "clip", "epsilon_high": -0.1}), (Grpo, {"epsilon_low": 1}), (Kto, {"z0": "token"}),
        (Grpo, {"normaliser": "rollouts"}), (Sft, {"behaviour": "teacher"}),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(kind: type[Loss], options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(reversed(options))):
        kind(name=kind.model_fields["name"].annotation.__args__[0], **options)  # type: ignore[union-attr]


def test_a_run_says_that_its_loss_is_unbounded(capsys: pytest.CaptureFixture[str]) -> None:
    print_once.cache_clear()
    for loss in (
        SFT,
        Grpo(name="grpo", ratio="clip"),
        Redi(name="redi", alpha=0),
        Redi(name="redi"),
        Redi(name="redi"),
    ):
        _note_unbounded(loss)
    assert capsys.readouterr().out.startswith("method=redi: unbounded below with these options: ")
    _note_unbounded(Grpo(name="grpo"))
    assert capsys.readouterr().out.count("\n") == 1
