"""Measures of one run on a fixed text that has nothing to do with the task."""

from __future__ import annotations

from losslens.measures import RunFunctionMeasure

MEASURES = (
    RunFunctionMeasure(
        name="off_task_kl", label="off-task KL", place=16.7, tier="more", unit="nats per token", digits=4,
        value=lambda of: of.behaviour(lambda run: run.off_task_kl),
        null=lambda of: of.behaviour(lambda run: run.off_task_kl_null), term="off-task KL",
        summary="How much a run's outputs have changed on plain English that has nothing to do with the task.",
        definition="KL(π₀ ‖ π) on the off-task text, mean over its tokens; it sees changes that cancel in the "
        "cross-entropy. The null is the mean of rotated copies of the same norm", source="2509.04259",
    ),
    RunFunctionMeasure(
        name="off_task_change", label="off-task cross-entropy, change", short="off-task CE", place=16.8,
        unit="nats per token", digits=4, bounds=(-1.0, 1.0),
        value=lambda of: of.behaviour(lambda run: run.off_task_change),
        null=lambda of: of.behaviour(lambda run: run.off_task_change_null), term="off-task KL",
        definition="the run's cross-entropy on the off-task text less the base's: above 0 the text has become less "
        "likely. The null is a 95% bound of the absolute change by a rotated copy of the same norm",
    ),
)  # fmt: skip
