"""Measures of two runs by their answers: flips against the base, and κ."""

from __future__ import annotations

from losslens.measures import FunctionMeasure

MEASURES = (
    FunctionMeasure(
        name="flips", label="cosine of flips", short="flips", place=75, tier="more", kind="similarity", identical=1.0,
        bounds=(-1.0, 1.0), term="flips",
        value=lambda of: of.answer(lambda pair: pair.flips), null=lambda of: of.answer(lambda pair: pair.flips_null),
        summary="How far two updates break and mend the answers to the same problems: 1 the same ones, 0 different "
        "ones, −1 the one breaks what the other mends.",
        definition="Σ f_a·f_b/√(Σ f_a²·Σ f_b²) over the problems of the primary benchmark, with f the share of correct "
        "answers minus the base's",
    ),
    FunctionMeasure(
        name="kappa", label="κ of answers", short="κ", place=76, kind="level", identical=1.0, bounds=(0.0, 1.0),
        term="κ",
        value=lambda of: of.answer(lambda pair: pair.kappa), null=lambda of: of.answer(lambda pair: pair.kappa_null),
        summary="How far two models are right and wrong on the same problems, beyond what their accuracies imply: 1 on "
        "the same ones, 0 by chance.",
        definition="(p_o − p_e)/(1 − p_e): p_o the share of problems on which both are correct or both incorrect, "
        "p_e = p_a·p_b + (1 − p_a)(1 − p_b); single answers only",
        source="Cohen 1960; error consistency: Geirhos et al. 2020",
    ),
)  # fmt: skip
