"""Plain words: each measure in a sentence, for newcomers; definitions: docs/reference/measures.md.

Losses have theirs where they are defined (`losslens.losses`).
"""

from __future__ import annotations

from losslens.measures import glossary_terms, run_measures, weight_measures

_BEFORE = {"ΔW": "What training added to the weights of the base: the update of a run."}
_BESIDE = {
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


def glossary() -> dict[str, str]:
    """Each measure, and what stands beside it, in a sentence; docs/reference/measures.md has the same ones."""
    return {**_BEFORE, **glossary_terms(), **_BESIDE}


def describe(heading: str) -> str:
    """The sentence about what a heading names, or nothing."""
    known = [name for name in glossary() if name.lower() in heading.lower()]
    return glossary()[max(known, key=len)] if known else ""


# Of what is logged while a run trains: the title of its plot, and the unit on its axis.
COURSE = {
    **{measure.name: measure.title for measure in run_measures() if not measure.needs_base},
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
    "logps/correct": "Right rollouts: log-probability (nats a token)",
    "logps/incorrect": "Wrong rollouts: log-probability (nats a token)",
    "weight/correct": "Right rollouts: weight of a token",
    "weight/incorrect": "Wrong rollouts: weight of a token",
    "weight/zero": "Share of tokens without weight",
    "weight/effective": "Effective share of the tokens",
}
# What runs log whose loss has a reference.
WITH_REFERENCE = {
    "log_ratio/correct": "Right rollouts: log-ratio to the base (nats a token)",
    "log_ratio/incorrect": "Wrong rollouts: log-ratio to the base (nats a token)",
}
# Of each run that they are compared with, whose label follows.
TO_REFERENCE = {f"{measure.name}_to_": measure.titled(" to {}") for measure in weight_measures("main")}
