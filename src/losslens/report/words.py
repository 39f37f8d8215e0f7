"""Plain words: each loss and each measure in a sentence, for who meets it for the first time.

docs/methods.md has the equations, docs/measures.md the definitions.
"""

from __future__ import annotations

# Of each loss what it learns from, and how; README and docs/methods.md have the same sentences.
LOSSES = {
    "sft": "Supervised fine-tuning: imitates every rollout, right or wrong.",
    "rft": "Rejection-sampling fine-tuning: imitates the right rollouts and ignores the wrong ones.",
    "rift": "Reward-informed fine-tuning: imitates the right rollouts and gently pushes the wrong ones down.",
    "dft": "Dynamic fine-tuning: imitates every rollout, but each token only as much as the model already expects it.",
    "grpo": "Group-relative policy optimisation, offline: pulls up rollouts that are better than the others of their "
    "prompt, pushes down those that are worse.",
    "dpo": "Direct preference optimisation: learns from pairs of a right and a wrong rollout to prefer the right one.",
}

# Each measure, as the page calls it; docs/measures.md has the same sentences.
MEASURES = {
    "ΔW": "What training added to the weights of the base: the update of a run.",
    "‖ΔW‖": "The size of the update: how far the weights have moved, in whatever direction.",
    "cosine": "How far two updates point the same way: 1 the same direction, 0 unrelated, −1 opposite.",
    "angle": "The smallest angle between the main directions of two updates; left for what a layer writes, right for "
    "what it reads. 0°: they share a direction, 90°: they share none.",
    "effective rank": "How many directions an update really uses.",
    "stable rank": "The same, measured against the strongest direction: 1 where that one carries all.",
    "drift": "How far LoRA's A has turned from where it began, in degrees.",
    "barrier": "How much the loss rises on the straight way from one trained model to another. 0: they lie in one "
    "valley.",
    "CKA": "How alike two models' hidden states are on the same texts: 1 the same but for a rotation, 0 unrelated.",
    "agreement of u₁, v₁": "How well the strongest directions that two updates write (u₁) and read (v₁) agree: 1 the "
    "same, 0 unrelated.",
    "orthogonal share": "The part of one update that has nothing to do with the other's direction.",
    "null": "What two updates show that have nothing in common: a number within it is no sign of a relation.",
    "repeat": "What a loss shows with itself, trained again with one thing changed: the order of the data, or the "
    "start.",
    "ceiling": "What two losses would show if they were one: of cosines and CKA, from their repeats. A cosine means as "
    "much as its ratio to the ceiling.",
    "accuracy": "The share of held-out problems that a run answers right; the 95% interval says how well these "
    "problems tell it.",
    "p (Holm)": "How often chance alone would give such a difference or a larger one, corrected for all the tests "
    "made.",
}


def about(heading: str) -> str:
    """The sentence about what a heading names, or nothing."""
    known = [name for name in MEASURES if name.lower() in heading.lower()]
    return MEASURES[max(known, key=len)] if known else ""


# Of what is logged while a run trains: the title of its plot, and the unit on its axis.
COURSE = {
    "norm": "‖ΔW‖",
    "effective_rank": "Effective rank",
    "stable_rank": "Stable rank",
    "drift_min": "Drift of A, smallest angle (°)",
    "drift_max": "Drift of A, largest angle (°)",
    "cosine_to_previous": "Cosine of ΔW to the one logged before",
    "cosine_of_steps": "Cosine of two steps in a row",
}
# Of each run that they are compared with, whose label follows.
TO_REFERENCE = {
    "cosine_to_": "Cosine to {}",
    "angle_min_left_to_": "Smallest angle to {}, left (°)",
    "angle_min_right_to_": "Smallest angle to {}, right (°)",
}
