"""Plain words: each measure in a sentence, for who meets it for the first time; docs/measures.md has the definitions.

Losses have theirs where they are defined (`losslens.losses`).
"""

from __future__ import annotations

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
# What every run logs while it trains; what one loss alone logs is titled where that is defined.
TRAINING = {
    "loss": "Loss",
    "grad_norm": "Norm of the gradient",
    "clip/share": "Share of steps whose gradient was clipped",
    "lr": "Learning rate",
    "entropy": "Entropy (nats)",
    "token_accuracy": "Token accuracy",
    "tokens_per_second": "Tokens per second",
    "logps/right": "Right rollouts: log-probability (nats a token)",
    "logps/wrong": "Wrong rollouts: log-probability (nats a token)",
    "weight/right": "Right rollouts: weight of a token",
    "weight/wrong": "Wrong rollouts: weight of a token",
    "weight/zero": "Share of tokens without weight",
    "weight/effective": "Effective share of the tokens",
}
# What runs log whose loss has a reference.
WITH_REFERENCE = {
    "log_ratio/right": "Right rollouts: log-ratio to the base (nats a token)",
    "log_ratio/wrong": "Wrong rollouts: log-ratio to the base (nats a token)",
}
# Of each run that they are compared with, whose label follows.
TO_REFERENCE = {
    "cosine_to_": "Cosine to {}",
    "angle_min_left_to_": "Smallest angle to {}, left (°)",
    "angle_min_right_to_": "Smallest angle to {}, right (°)",
}
