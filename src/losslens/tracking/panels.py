"""Content of a sweep's dashboard: its sections and panels, by the names of the logged metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from losslens.losses.presentation import diagnostic_titles
from losslens.tables import descriptions
from losslens.tables.format import listed
from losslens.tables.style import loss_title
from losslens.tracking.logged_sweep import LoggedSweep

# For metrics of runs: lines over steps, bars and points of the last values. For logged analyses: tables, charts of
# wandb.plot, the page of the report, and figures.
Kind = Literal["lines", "bars", "points", "table", "chart", "page", "figures"]

TRAINING = {f"train/{name}": title for name, title in descriptions.TRAINING.items()}
NORM = "geometry/norm"
GEOMETRY = {
    **{f"geometry/{name}": title for name, title in descriptions.COURSE.items()},
    "geometry/share_of_time": "Share of training time spent on geometry",
}
LAYER = "layer_"
# Prefix of the metric of each reference, followed by its label.
COSINE = "geometry/cosine_to_"
TO_REFERENCE = {f"geometry/{begin}": title for begin, title in descriptions.TO_REFERENCE.items()}
_DEFAULT_REFERENCE = "sft"
TABLES = {
    "tables/runs": "Runs",
    "tables/arm_pairs": "Pairs of arms: measures, ceilings and verdicts",
    "tables/pairs": "Pairs of runs",
    "tables/repeats": "Repeats: runs of the same arm compared with each other",
    "tables/arms": "Arms",
    "tables/seeds": "Spread over seeds",
}
# Title and x and y columns of the charts, by the name of the analysis table.
CHARTS = {
    "connectivity": ("Connectivity: the loss between two runs", "alpha", "loss"),
    "cka": ("CKA: hidden states by layer", "layer", "cka_unbiased"),
}
REPORT = "report"
FIGURES = ("cosines", "accuracies", "norms", "angles", "connectivity", "learning_rate")


@dataclass(frozen=True)
class Panel:
    """A panel of the dashboard.

    Attributes:
        kind: Type of the panel.
        title: Its title.
        names: Names of the logged values; for points, those of x and y.
    """

    kind: Kind
    title: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A titled row of panels.

    Attributes:
        title: Its title.
        text: Explanation for the reader.
        panels: The panels.
        details: True for details, which are collapsed in the workspace and left out of the report.
        of_analysis: True if the panels show a logged analysis rather than the runs.
    """

    title: str
    text: str
    panels: tuple[Panel, ...]
    details: bool = False
    of_analysis: bool = False


def sections(sweep: LoggedSweep) -> list[Section]:
    """Returns the sections of a sweep's dashboard that have data."""
    return [section for section in _all(sweep) if section.panels]


def missing_data(sweep: LoggedSweep) -> list[str]:
    """Returns sentences about what the dashboard does not show yet."""
    missing = [section.title for section in _all(sweep) if not section.panels]
    lines = [panel for section in sections(sweep) for panel in section.panels if panel.kind == "lines"]
    empty = [name for panel in lines for name in panel.names if name not in sweep.names]
    sentences = []
    if missing:
        sentences.append(f"sections left out because they have no data yet: {listed(missing)}")
    if empty:
        sentences.append(f"panels that stay empty until a run logs these metrics: {listed(empty)}")
    return sentences


def _all(sweep: LoggedSweep) -> list[Section]:
    scored_on, compared_with = benchmarks(sweep), references(sweep)
    return [
        Section(
            "Training",
            "Metrics logged during training. Values of different losses are not comparable; compare their course.",
            tuple(Panel("lines", title, (name,)) for name, title in _training(sweep).items()),
        ),
        Section(
            "Geometry",
            "The update ΔW = BA of all adapted modules, compared with the initial adapter, the previously logged "
            "update, and the finished run that serves as reference.",
            (
                *(Panel("lines", title, (name,)) for name, title in GEOMETRY.items()),
                *(
                    Panel("lines", title.format(loss_title(label)), (f"{prefix}{label}",))
                    for label in compared_with
                    for prefix, title in TO_REFERENCE.items()
                ),
            ),
        ),
        Section("Geometry by layer", "‖ΔW‖ by layer.", _norms(sweep, of_layers=True), details=True),
        Section("Geometry by projection", "‖ΔW‖ by projection.", _norms(sweep, of_layers=False), details=True),
        Section(
            "Accuracy",
            "Accuracy of greedy answers on held-out problems, with the 95% interval of each run.",
            tuple(
                panel
                for name in scored_on
                for panel in (
                    Panel("bars", f"Accuracy on {name}", (accuracy(name),)),
                    Panel("bars", f"95% interval on {name}", (f"eval/{name}/ci_low", f"eval/{name}/ci_high")),
                )
            ),
        ),
        Section(
            "Losses compared",
            "One point per run, at the end of training.",
            (
                *(Panel("points", f"Accuracy on {name} and ‖ΔW‖", (NORM, accuracy(name))) for name in scored_on),
                *(
                    Panel("points", f"Cosine to {loss_title(label)} and ‖ΔW‖", (NORM, f"{COSINE}{label}"))
                    for label in compared_with
                ),
            ),
        ),
        Section(
            "Losses compared: the analysis",
            "Results of analyze.py: measures of all pairs of arms and of runs, with their ceilings and repeat levels.",
            (
                *(Panel("table", title, (name,)) for name, title in TABLES.items()),
                *(Panel("chart", title, (name,)) for name, (title, _, _) in CHARTS.items()),
                Panel("page", "The report", (REPORT,)),
                Panel("figures", "Figures", tuple(f"figures/{name}" for name in FIGURES)),
            ),
            of_analysis=True,
        ),
    ]


def _training(sweep: LoggedSweep) -> dict[str, str]:
    """Titles of the metrics that all runs log, and of those specific to some losses that a run has logged."""
    specific = {f"train/{name}": title for name, title in (descriptions.WITH_REFERENCE | diagnostic_titles()).items()}
    return TRAINING | {name: title for name, title in specific.items() if name in sweep.names}


def benchmarks(sweep: LoggedSweep) -> list[str]:
    """Returns the names of the benchmarks that runs were scored on, from their files and logged metrics."""
    prefix, suffix = accuracy("|").split("|")
    logged = {name.removeprefix(prefix).removesuffix(suffix) for name in sweep.names if name.endswith(suffix)}
    return sorted({*sweep.benchmarks, *logged})


def accuracy(benchmark: str) -> str:
    """Returns the metric name of the accuracy on a benchmark."""
    return f"eval/{benchmark}/accuracy"


def references(sweep: LoggedSweep) -> list[str]:
    """Returns the labels of the references in the logged metrics; the default one if there are none yet."""
    labels = {name.removeprefix(COSINE) for name in sweep.names - GEOMETRY.keys() if name.startswith(COSINE)}
    return sorted(labels) or [_DEFAULT_REFERENCE]


def _norms(sweep: LoggedSweep, of_layers: bool) -> tuple[Panel, ...]:
    """One panel of ‖ΔW‖ per layer, or per projection."""
    parts = [name.removeprefix(f"{NORM}/") for name in sweep.names if name.startswith(f"{NORM}/")]
    numbers = sorted(int(part.removeprefix(LAYER)) for part in parts if part.startswith(LAYER))
    titles = {
        f"{LAYER}{number}": f"layer {number}" if number >= 0 else "modules outside the layers" for number in numbers
    }
    if not of_layers:
        titles = {part: part for part in sorted(parts) if part not in titles}
    return tuple(Panel("lines", f"‖ΔW‖ of {title}", (f"{NORM}/{part}",)) for part, title in titles.items())
