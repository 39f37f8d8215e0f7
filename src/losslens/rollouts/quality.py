"""Quality of frozen rollouts: a summary for the user, and a check that training on them makes sense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from losslens.config.data import Rollouts
from losslens.core.errors import InputError
from losslens.rollouts.frozen import FrozenRollouts, count_rollouts

if TYPE_CHECKING:
    from losslens.config.training import TrainOn
    from losslens.losses import Loss

_MAX_TRUNCATED = 0.5  # with a larger share of truncated rollouts, a model learns little but where to stop


def rollout_quality(rollouts: FrozenRollouts) -> dict[str, str]:
    """Formats counts and shares of frozen rollouts, by label."""
    counts = dict(count_rollouts(rollouts.table))
    # Only known for sampled rollouts, not for a user's file.
    counts["unchecked"] = rollouts.manifest.get("unchecked")
    names = {"pass_rate": "pass rate", "truncated": "truncated at the token limit"}
    return {
        names.get(name, name.replace("_", " ")): f"{value:.1%}" if isinstance(value, float) else str(value)
        for name, value in counts.items()
        if value is not None
    }


def require_rewards(rollouts: FrozenRollouts, loss: Loss, train_on: TrainOn) -> None:
    """Checks that rewards are 1 or 0, unless the loss can use other numbers.

    Raises:
        InputError: One is another number, though the loss, or `train_on`, asks which rollouts are correct.
    """
    if loss.any_reward and train_on == "all":
        return
    asks = f"train_on={train_on}" if loss.any_reward else f"method={loss.name}"
    for row, reward in enumerate(rollouts.table["reward"], 1):
        if reward not in (0, 1):
            raise InputError(
                f"{rollouts.folder / 'rollouts.parquet'}: row {row}: reward is {reward:g}, but {asks} needs 1 "
                "(correct) or 0 (incorrect)"
            )


def require_usable(rollouts: FrozenRollouts, settings: Rollouts, uses_reward: bool) -> None:
    """Refuses to train if no rollout is correct or more than half are truncated, unless `settings.accept` allows it.

    In a user's file a reward of 0 may mean that the rollout was not verified, so a loss that ignores rewards may train
    on it.

    Args:
        rollouts: The frozen rollouts.
        settings: How they were sampled, and which problems to accept.
        uses_reward: True if the loss treats correct and incorrect rollouts differently, and takes no other rewards.

    Raises:
        InputError: There is almost nothing to learn; the message says what to change, and how to train anyway.
    """
    counts = count_rollouts(rollouts.table)
    total, truncated = counts["rollouts"], counts["truncated"]
    assert total is not None
    assert truncated is not None
    sampled = "policy" in rollouts.manifest
    writer = rollouts.manifest.get("writer", rollouts.folder)
    reasons = {}
    if not counts["pass_rate"] and (sampled or uses_reward):
        reasons["all_incorrect"] = f"none of {total} is correct"
    if truncated > _MAX_TRUNCATED * total:
        limit = f" (rollouts.max_tokens={settings.max_tokens})" if sampled else ""
        reasons["mostly_cut"] = f"{truncated} of {total} are truncated at the token limit{limit}"
    reasons = {name: text for name, text in reasons.items() if name not in settings.accept}
    if reasons:
        accept = "'rollouts.accept=[{}]'" if len({*reasons, *settings.accept}) > 1 else "rollouts.accept={}"
        accept = accept.format(",".join(sorted({*reasons, *settings.accept})))
        remedy = (
            "use more tokens, another model (rollouts.policy, model.teacher, rollouts.engine) or easier problems; "
            if sampled
            else ""
        )
        raise InputError(
            f"rollouts: {' and '.join(reasons.values())} in {rollouts.folder.name}, sampled from {writer}; "
            f"{remedy}to train on them anyway: {accept}"
        )
