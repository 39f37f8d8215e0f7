"""Measures of how updates shift hidden states, at two positions: size of one shift, cosine of two."""

from __future__ import annotations

from losslens.measures import FunctionMeasure, RunFunctionMeasure
from losslens.measures.activations import COMPLETION, PROMPT
from losslens.measures.views import Array

_COSINE = "Σ_n⟨δ_a, δ_b⟩/√(Σ_n‖δ_a‖²·Σ_n‖δ_b‖²) of the shifts δ = h − h₀"


def _prompt(by_position: Array) -> float:
    """Returns the value at the prompt's last token, in the middle of the hidden states."""
    return float(by_position[PROMPT, by_position.shape[1] // 2])


def _completion(by_position: Array) -> float:
    """Returns the value of the last hidden state, mean over the completion."""
    return float(by_position[COMPLETION, -1])


MEASURES = (
    RunFunctionMeasure(
        name="shift_size", label="relative size of the activation shift", short="shift", place=16.5, unit="%", digits=1,
        value=lambda of: of.behaviour(lambda run: _completion(run.shift_size)),
        null=lambda of: of.behaviour(lambda run: _completion(run.shift_size_null)), term="activation shift",
        definition="root mean square over sequences of ‖δ‖ over that of ‖h₀‖, with δ = h − h₀ the shift of the last "
        "hidden state, mean over the completion's tokens. The null is the mean of rotated copies of the same KL",
    ),
    FunctionMeasure(
        name="shift_cosine", label="cosine of activation shifts, completion", short="shift cosine", place=72,
        kind="similarity", identical=1.0, bounds=(-1.0, 1.0), term="activation shift",
        value=lambda of: of.behaviour(lambda pair: _completion(pair.shift_cosine)),
        null=lambda of: of.behaviour(lambda pair: _completion(pair.shift_cosine_null)),
        summary="Where an update moves the hidden states, compared without the rotations that CKA allows.",
        definition=f"{_COSINE} of the last hidden state, mean over the completion's tokens", source="2510.13900",
    ),
    FunctionMeasure(
        name="shift_cosine_prompt", label="cosine of activation shifts, prompt", short="shift cosine, prompt", place=73,
        kind="similarity", identical=1.0, bounds=(-1.0, 1.0), term="activation shift",
        value=lambda of: of.behaviour(lambda pair: _prompt(pair.shift_cosine)),
        null=lambda of: of.behaviour(lambda pair: _prompt(pair.shift_cosine_null)),
        definition=f"{_COSINE} of the middle hidden state, at the prompt's last token", source="2510.13900",
    ),
)  # fmt: skip
