"""Measure of two runs: the cosine of their output shifts."""

from __future__ import annotations

from losslens.measures import FunctionMeasure

MEASURES = (
    FunctionMeasure(
        name="output_cosine", label="cosine of output shifts", short="output cosine", place=70, tier="main",
        kind="similarity", identical=1.0, bounds=(-1.0, 1.0), term="output cosine",
        value=lambda of: of.behaviour(lambda pair: pair.output_cosine),
        null=lambda of: of.behaviour(lambda pair: pair.output_cosine_null),
        summary="How far two updates change the model's next-token distributions in the same way: 1 the same, 0 "
        "unrelated, −1 opposite.",
        definition="mean_t Cov(F_a, F_b)/√(mean_t Var(F_a)·mean_t Var(F_b)) under the base's distribution π₀, with "
        "F = log π − log π₀ at each token of the probe set's completions",
        source="Fisher metric, at finite size: Amari 1998",
    ),
)  # fmt: skip
