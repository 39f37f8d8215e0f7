"""Rollouts that are left out: columns stay those of whole groups, and a loss that nothing is left for is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from losslens.config.training import Optim, TrainOn
from losslens.core.errors import InputError
from losslens.losses import Loss
from losslens.losses.a_star_po import AStarPo
from losslens.losses.awr import Awr
from losslens.losses.dpo import Dpo
from losslens.losses.grpo import Grpo
from losslens.losses.kto import Kto
from losslens.losses.nft import Nft
from losslens.losses.redi import Redi
from losslens.losses.rft import Rft
from losslens.losses.rift import Rift
from losslens.losses.sft import Sft
from losslens.losses.topr import Topr
from losslens.rollouts.frozen import FrozenRollouts, freeze, load_rollouts
from losslens.rollouts.quality import require_rewards
from losslens.runs.spec import _statistics_identity
from losslens.training.batches import Examples, filter_rollouts
from losslens.training.source import FrozenSource
from tests.conftest import OPTIM
from tests.test_losses import variants

pytestmark = pytest.mark.fast


def table(rewards: dict[str, list[float]], longest: int = 0) -> pd.DataFrame:
    """Rollouts of these rewards by prompt, of two tokens each, and of five at the row `longest`."""
    rows = [(prompt, reward) for prompt, values in rewards.items() for reward in values]
    return pd.DataFrame(
        {
            "problem_id": [prompt for prompt, _ in rows],
            "group": pd.factorize(pd.Series([prompt for prompt, _ in rows]))[0],
            "completion": [f"{number}" for number in range(len(rows))],
            "reward": [reward for _, reward in rows],
            "prompt_ids": [[1]] * len(rows),
            "completion_ids": [[2] * (5 if number == longest else 2) for number in range(len(rows))],
            "sampler_logps": [[-0.5] * 2] * len(rows),
            "sampler_raw_logps": [[-0.5] * 2] * len(rows),
            "place": range(len(rows)),
        }
    )


class TestColumns:
    @pytest.mark.parametrize(
        ("loss", "columns"),
        [
            (Grpo(name="grpo", bias=0.0), {"advantage": [0.75, -0.25]}),
            # √(¼·¾) = .433013
            (Grpo(name="grpo", bias=0.0, std_norm=True), {"advantage": [1.732051, -0.577350]}),
            (Grpo(name="grpo", normaliser="constant"), {"advantage": [0.85, -0.15], "longest": [5, 5]}),
            (Awr(name="awr"), {"advantage": [0.75, -0.25]}),
            (Awr(name="awr", baseline="none"), {"advantage": [1, 0]}),
            (Nft(name="nft"), {"pass_rate": [0.25, 0.25]}),
            # ½·ln((e² + 3)/4)
            (AStarPo(name="a_star_po"), {"optimal_value": [0.5 * math.log((math.e**2 + 3) / 4)] * 2}),
        ],
        ids=lambda value: value.name if isinstance(value, Loss) else None,
    )
    def test_of_a_group_of_four_of_which_a_pair_is_kept(self, loss: Loss, columns: dict[str, list[float]]) -> None:
        """Rewards 0, 1, 0, 0: the pair is the second and the first rollout, and r̄ = ¼ instead of ½."""
        examples = Examples(table({"a": [0, 1, 0, 0]}, longest=3), loss, "paired_rollouts")
        assert list(examples.table.index) == [0, 1]
        assert {name: [values[1], values[0]] for name, values in examples.columns.items()} == {
            name: pytest.approx(values, abs=1e-6) for name, values in columns.items()
        }

    def test_follow_their_rows_through_a_selection_of_ones_own(self) -> None:
        class Turned(Grpo):
            def select(self, rollouts: pd.DataFrame) -> pd.DataFrame:
                return rollouts[rollouts["reward"] > 0].iloc[::-1].reset_index(drop=True)

        examples = Examples(table({"a": [0, 1, 0, 0], "b": [1, 0]}), Turned(name="grpo", bias=0))
        assert examples.columns["advantage"].tolist() == [0.5, 0.75]

    @pytest.mark.parametrize("train_on", ["mixed_groups", "paired_rollouts"])
    @pytest.mark.parametrize("loss", variants().values(), ids=variants())
    def test_the_identity_tells_what_changed(self, loss: Loss, train_on: TrainOn) -> None:
        """It changed where columns of the rollouts that are left differ from those of all, and only there."""
        rollouts = table({"a": [0, 1, 0, 0], "b": [1, 1], "c": [1, 0, 1]}, longest=4)
        left = filter_rollouts(rollouts, train_on)
        before, now = loss.columns(left), Examples(rollouts, loss, train_on).columns
        kept = loss.select(left).index
        changed = any(not np.allclose(values, before[name][left.index.isin(kept)]) for name, values in now.items())
        assert bool(_statistics_identity(loss, loss.learns_from(train_on))) == changed
        assert not _statistics_identity(loss, "all")


class TestNothingToLearn:
    @pytest.mark.parametrize(
        ("loss", "rewards", "train_on", "why"),
        [
            (Rft(name="rft"), {"a": [0, 0]}, "all", "none of the 2 rollouts is correct"),
            (Rft(name="rft", incorrect="drop"), {"a": [0, 0]}, "all", "none of the 2 rollouts is correct"),
            (Redi(name="redi", alpha=0), {"a": [0, 0]}, "all", "none of the 2 rollouts is correct"),
            (Rift(name="rift", reward_incorrect=0), {"a": [0, 0]}, "all", "none of the 2 rollouts is correct"),
            (Kto(name="kto", undesirable_weight=0), {"a": [0, 0]}, "all", "none of the 2 rollouts is correct"),
            (Kto(name="kto", desirable_weight=0), {"a": [1], "b": [1]}, "all", "all 2 rollouts are correct"),
            (AStarPo(name="a_star_po"), {"a": [1, 1], "b": [0]}, "all", "no prompt has both"),
            (Grpo(name="grpo", bias=0), {"a": [1, 1], "b": [0, 0]}, "all", "the rewards of each prompt are equal"),
            (
                Grpo(name="grpo", bias=0, kl_coef=0.1),
                {"a": [1, 1], "b": [0, 0]},
                "all",
                "the rewards of each prompt are equal",
            ),
            (Grpo(name="grpo", bias_scope="all_positive"), {"a": [0, 0]}, "all", "none of the 2 rollouts is correct"),
            (Nft(name="nft"), {"a": [1, 1], "b": [0]}, "all", "no prompt has both"),
            (Dpo(name="dpo"), {"a": [1, 1], "b": [0]}, "all", "no prompt has both"),
            (Sft(name="sft"), {"a": [1, 1], "b": [0]}, "paired_rollouts", "no prompt has both"),
            # 1 − λR is 0 for correct rollouts, and .4 for incorrect ones.
            (
                Rift(name="rift", form="affine", affine_lambda=1),
                {"a": [1, 1]},
                "all",
                "all 2",
            ),
        ],
    )
    def test_ends_in_one_line(self, loss: Loss, rewards: Any, train_on: TrainOn, why: str) -> None:
        rows = "" if train_on == "all" else f" train_on={train_on}"
        line = f"^method={loss.name}{rows}: nothing to learn from these rollouts: {why}[^\n]*$"
        with pytest.raises(InputError, match=line):
            FrozenSource(table(rewards), loss, Optim(**{**OPTIM, "batch_size": 1}), 0, train_on)

    @pytest.mark.parametrize(
        ("loss", "rewards"),
        [
            (Sft(name="sft"), {"a": [0, 0]}),
            (Topr(name="topr"), {"a": [0, 0]}),
            (Grpo(name="grpo"), {"a": [0, 0]}),
            (Grpo(name="grpo", bias=0), {"a": [0, 0], "b": [0, 1]}),
            (Kto(name="kto", z0="zero"), {"a": [0, 0]}),
            (Rift(name="rift", form="affine", affine_lambda=1), {"a": [1, 1], "b": [0]}),
        ],
    )
    def test_anything_to_learn_is_enough(self, loss: Loss, rewards: Any) -> None:
        FrozenSource(table(rewards), loss, Optim(**{**OPTIM, "batch_size": 1}), 0)

    @pytest.mark.parametrize("loss", variants().values(), ids=variants())
    def test_every_loss_learns_from_mixed_groups(self, loss: Loss) -> None:
        rewards: dict[str, list[float]] = {"a": [0, 1, 1], "b": [1, 0, 0]}
        FrozenSource(table(rewards), loss, Optim(**{**OPTIM, "batch_size": 6}), 0)


class TestRewards:
    rollouts = FrozenRollouts(Path("frozen"), pd.DataFrame({"reward": [1.0, 0.0, 0.5]}), {})

    @pytest.mark.parametrize(
        ("loss", "train_on", "asks"),
        [
            *[(loss, "all", f"method={loss.name}") for loss in (Rft(name="rft"), Dpo(name="dpo"), Nft(name="nft"))],
            (Grpo(name="grpo", bias_scope="all_positive"), "all", "method=grpo"),
            (Sft(name="sft"), "mixed_groups", "train_on=mixed_groups"),
        ],
    )  # fmt: skip
    def test_other_than_1_and_0_are_refused_by_losses_that_need_outcomes(
        self, loss: Loss, train_on: TrainOn, asks: str
    ) -> None:
        line = rf"^frozen/rollouts\.parquet: row 3: reward is 0\.5, but {asks} needs 1 \(correct\) or 0 \(incorrect\)$"
        with pytest.raises(InputError, match=line):
            require_rewards(self.rollouts, loss, train_on)

    def test_losses_of_the_numbers_take_any(self) -> None:
        """r̄ = ½: advantages ½, −½, 0."""
        for loss in (Sft(name="sft"), Awr(name="awr"), Grpo(name="grpo")):
            require_rewards(self.rollouts, loss, "all")
        columns = Examples(table({"a": [1.0, 0.0, 0.5]}), Grpo(name="grpo", bias=0)).columns
        assert columns["advantage"].tolist() == [0.5, -0.5, 0.0]

    @pytest.mark.parametrize("loss", variants().values(), ids=variants())
    def test_who_takes_any_number_uses_the_number(self, loss: Loss) -> None:
        """A loss that says so tells a reward of 2 from one of 1."""
        if loss.any_reward and loss.uses_reward:
            one, two = (loss.columns(table({"a": [value, 0.0, 0.5]}))["advantage"] for value in (1.0, 2.0))
            assert one[0] != two[0]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_number_that_is_none_is_refused_for_all(
        self, value: float, rollouts: pd.DataFrame, tmp_path: Path
    ) -> None:
        few = rollouts.head(3).assign(reward=[1.0, value, 0.0])
        with pytest.raises(InputError, match=r"rollouts\.parquet: row 2: reward is (nan|inf|null)"):
            load_rollouts(freeze(few, tmp_path, "odd", {}))
