"""Measure of two runs: the Jensen–Shannon divergence of their outputs."""

from __future__ import annotations

from losslens.measures import FunctionMeasure

MEASURES = (
    FunctionMeasure(
        name="js", label="Jensen–Shannon divergence", short="JS", place=71, kind="distance", identical=0.0,
        unit="nats per token", digits=5, term="JS",
        value=lambda of: of.behaviour(lambda pair: pair.js), null=lambda of: of.behaviour(lambda pair: pair.js_null),
        summary="How far apart two models' next-token distributions are: 0 the same, at most ln 2.",
        definition="½KL(π_a ‖ m) + ½KL(π_b ‖ m) with m = (π_a + π_b)/2, mean over the tokens of the probe set's "
        "completions", source="Lin 1991",
    ),
)  # fmt: skip
