"""Measure of one run: how many dimensions its last hidden states fill."""

from __future__ import annotations

from losslens.measures import RunFunctionMeasure

MEASURES = (
    RunFunctionMeasure(
        name="representation_rank", label="representation rank", short="repr. rank", place=16.6, digits=2,
        value=lambda of: of.behaviour(lambda run: run.rank), null=lambda of: of.behaviour(lambda run: run.rank_null),
        term="representation rank",
        summary="How many dimensions the last hidden states of different texts effectively fill.",
        definition="participation ratio (Σλ)²/Σλ² of the covariance over sequences of the last hidden state, mean over "
        "the completion's tokens; at most the smaller of its width and the sequences less one. The base's own value "
        "stands in its row; the null is the mean of rotated copies of the same KL", source="Gao et al. 2017",
    ),
)  # fmt: skip
