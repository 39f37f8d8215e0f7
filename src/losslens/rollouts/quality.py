"""What a frozen set is like, for people, and whether there is anything in it to learn from."""

from __future__ import annotations

from losslens.config.data import Rollouts
from losslens.core.errors import InputError
from losslens.rollouts.frozen import FrozenRollouts, count_rollouts

_CUT = 0.5  # a larger share of cut rollouts than this teaches where to stop, and little else


def rollout_quality(rollouts: FrozenRollouts) -> dict[str, str]:
    """Counts and shares of a frozen set, as text, by their names."""
    found = dict(count_rollouts(rollouts.table))
    # How many answers could not be checked is known where they were sampled, and not of a user's file.
    found["unchecked"] = rollouts.manifest.get("unchecked")
    names = {"pass_rate": "share correct", "truncated": "cut at the token limit"}
    return {
        names.get(name, name.replace("_", " ")): f"{value:.1%}" if isinstance(value, float) else str(value)
        for name, value in found.items()
        if value is not None
    }


def require_usable(rollouts: FrozenRollouts, settings: Rollouts, uses_reward: bool) -> None:
    """Refuses to train on rollouts of which none is correct, or more than half are cut, unless `settings.accept`s it.

    In a user's own file a reward of 0 may mean that nobody has checked: a method that does not use it trains all the
    same.

    Args:
        rollouts: The frozen set.
        settings: How it was sampled, and what to accept.
        uses_reward: Whether the method learns something else from a correct rollout than from an incorrect one.

    Raises:
        InputError: There is next to nothing to learn; the message says what to change, and how to go on all the same.
    """
    found = count_rollouts(rollouts.table)
    total, cut = found["rollouts"], found["truncated"]
    assert total is not None
    assert cut is not None
    sampled = "policy" in rollouts.manifest
    writer = rollouts.manifest.get("writer", rollouts.folder)
    wrong = {}
    if not found["pass_rate"] and (sampled or uses_reward):
        wrong["all_incorrect"] = f"none of {total} is correct"
    if cut > _CUT * total:
        longer = f" (rollouts.max_tokens={settings.max_tokens})" if sampled else ""
        wrong["mostly_cut"] = f"{cut} of {total} are cut at the token limit{longer}"
    wrong = {name: text for name, text in wrong.items() if name not in settings.accept}
    if wrong:
        accept = "'rollouts.accept=[{}]'" if len({*wrong, *settings.accept}) > 1 else "rollouts.accept={}"
        accept = accept.format(",".join(sorted({*wrong, *settings.accept})))
        instead = "more tokens, another writer (rollouts.policy, model.teacher, rollouts.engine) or easier problems; "
        raise InputError(
            f"rollouts: {' and '.join(wrong.values())} in {rollouts.folder.name}, written by {writer}; "
            f"{instead if sampled else ''}to train on them all the same: {accept}"
        )
