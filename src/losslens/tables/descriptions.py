"""Plain-language descriptions of terms and measures; docs/reference/measures.md has the definitions.

Losses are described where they are defined (`losslens.losses`).
"""

from __future__ import annotations

from losslens.measures import glossary_terms, run_weight_measures, weight_measures

# The experiment: shown in the glossary of the report only.
EXPERIMENT = {
    "base": "The model before training; every run starts from it, and its accuracy is the baseline.",
    "rollout": "A completion sampled for a training prompt; it is correct if its final answer is correct, else "
    "incorrect.",
    "pass rate": "The share of rollouts that are correct.",
    "arm": "All runs of one configuration (loss, learning rate and settings); they differ only in their seeds.",
    "seed": "The number that sets the order of the training data; runs of the same seed share their batches.",
    "init_seed": "The number that sets the initial adapter; runs of the same init_seed start from the same A.",
    "merge": "One update made of two, in a causal check; its baseline is the merge of two repeats of a loss.",
    "restored": "Put back to the weights of the base: some directions of an update, in a causal check.",
}
_UPDATE = {"ΔW": "The update of a run: what training added to the weights of the base."}
# How measures and accuracies are judged.
JUDGEMENT = {
    "null": "What two updates with nothing in common would show; a value within the null is no evidence of a relation.",
    "repeat": "What a loss shows when compared with itself, trained again with a different data order, initial adapter "
    "or both.",
    "ceiling": "What two losses would show if they were the same loss, computed from their repeats (for cosines and "
    "CKA); a cosine is judged by its ratio to the ceiling.",
    "repeat level": "What two losses would show if they were the same loss, for measures without a ceiling; for most "
    "measures, the mean of their repeats.",
    "accuracy": "The share of held-out problems that a run answers correctly; the 95% interval is its uncertainty over "
    "problems.",
    "p (Holm)": "The probability that chance alone gives such a difference or a larger one, corrected for the number "
    "of tests.",
}


def measure_terms() -> dict[str, str]:
    """Returns a one-sentence description of ΔW and of each measure."""
    return {**_UPDATE, **glossary_terms()}


def glossary() -> dict[str, str]:
    """Returns a one-sentence description of each measure and of how it is judged, as in docs/reference/measures.md."""
    return {**measure_terms(), **JUDGEMENT}


def describe(heading: str) -> str:
    """Returns the description of the longest glossary term in a heading; empty if there is none."""
    known = [name for name in glossary() if name.lower() in heading.lower()]
    return glossary()[max(known, key=len)] if known else ""


# Titles, with units, of the measures of an update that are logged while a run trains.
COURSE = {
    **{measure.name: measure.title for measure in run_weight_measures() if measure.logged},
    "cosine_to_previous": "Cosine of ΔW to the previous logged ΔW",
    "cosine_of_steps": "Cosine of two consecutive steps",
}
# Titles of the metrics that every run logs; those of a single loss are defined with the loss.
TRAINING = {
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "clip/share": "Share of steps with a clipped gradient",
    "lr": "Learning rate",
    "entropy": "Entropy (nats)",
    "token_accuracy": "Token accuracy",
    "tokens_per_second": "Tokens per second",
    "logps/correct": "Correct rollouts: log-probability (nats per token)",
    "logps/incorrect": "Incorrect rollouts: log-probability (nats per token)",
    "weight/correct": "Correct rollouts: weight per token",
    "weight/incorrect": "Incorrect rollouts: weight per token",
    "weight/zero": "Share of tokens with zero weight",
    "weight/effective": "Effective share of tokens",
}
# Titles of the metrics of losses with a reference model.
WITH_REFERENCE = {
    "log_ratio/correct": "Correct rollouts: log-ratio to the base (nats per token)",
    "log_ratio/incorrect": "Incorrect rollouts: log-ratio to the base (nats per token)",
}
# Titles of the cosines and other measures to a reference run, by prefix; `{}` is its label.
TO_REFERENCE = {f"{measure.name}_to_": measure.titled(" to {}") for measure in weight_measures("main")}
