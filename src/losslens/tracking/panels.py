"""What the dashboard of a sweep shows: its sections and their panels, by the names under which things are logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from losslens.losses.presentation import diagnostic_titles
from losslens.tables import descriptions
from losslens.tables.format import listed
from losslens.tables.style import loss_title
from losslens.tracking.logged_sweep import LoggedSweep

# Of numbers, by their names: lines over the steps; bars and points of the last values. Of what the analysis sends:
# tables, wandb.plot's charts, the report's page, and figures.
Kind = Literal["lines", "bars", "points", "table", "chart", "page", "figures"]

TRAINING = {f"train/{name}": title for name, title in descriptions.TRAINING.items()}
NORM = "geometry/norm"
GEOMETRY = {
    **{f"geometry/{name}": title for name, title in descriptions.COURSE.items()},
    "geometry/share_of_time": "Share of the time that geometry takes",
}
LAYER = "layer_"
# Of each reference; its label follows.
COSINE = "geometry/cosine_to_"
TO_REFERENCE = {f"geometry/{begin}": title for begin, title in descriptions.TO_REFERENCE.items()}
_USUAL_REFERENCE = "sft"
TABLES = {
    "tables/runs": "Runs",
    "tables/arm_pairs": "Pairs of arms: what each two show, against their ceiling, and what that says",
    "tables/pairs": "Pairs of runs",
    "tables/repeats": "Repeats: an arm against itself",
    "tables/arms": "Arms",
    "tables/seeds": "Spread over seeds",
}
# The titles, and the columns along x and y of the analysis' table of that name.
CHARTS = {
    "connectivity": ("Connectivity: the loss between two runs", "alpha", "loss"),
    "cka": ("CKA: hidden states by layer", "layer", "cka_unbiased"),
}
REPORT = "report"
FIGURES = ("cosines", "accuracies", "norms", "angles", "connectivity", "learning_rate")


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        kind: What is drawn.
        title: What stands above it.
        names: Of what is drawn; of points the names of x and y.
    """

    kind: Kind
    title: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A titled row of panels.

    Attributes:
        title: What stands above them.
        text: What a reader should know of them.
        panels: The panels.
        details: Whether it is more than most readers want: closed in the workspace, and not in the report.
        of_analysis: Whether the panels show what the analysis has sent, not the runs.
    """

    title: str
    text: str
    panels: tuple[Panel, ...]
    details: bool = False
    of_analysis: bool = False


def sections(sweep: LoggedSweep) -> list[Section]:
    """The sections of the dashboard of a sweep; what is about nothing that is there yet is left out."""
    return [section for section in _all(sweep) if section.panels]


def gaps(sweep: LoggedSweep) -> list[str]:
    """What the dashboard does not show yet, a sentence each."""
    left_out = [section.title for section in _all(sweep) if not section.panels]
    lines = [panel for section in sections(sweep) for panel in section.panels if panel.kind == "lines"]
    empty = [name for panel in lines for name in panel.names if name not in sweep.names]
    told = []
    if left_out:
        told.append(f"left out, with nothing there yet: {listed(left_out)}")
    if empty:
        told.append(f"empty until a run logs it: {listed(empty)}")
    return told


def _all(sweep: LoggedSweep) -> list[Section]:
    scored_on, compared_with = benchmarks(sweep), references(sweep)
    return [
        Section(
            "Training",
            "What each run logs while it trains. The losses of two methods are two quantities: compare their course.",
            tuple(Panel("lines", title, (name,)) for name, title in _training(sweep).items()),
        ),
        Section(
            "Geometry",
            "Where the weights go: the update ΔW = BA of every adapted module, against the initial adapter, the update "
            "logged before, and the finished run that is the reference.",
            (
                *(Panel("lines", title, (name,)) for name, title in GEOMETRY.items()),
                *(
                    Panel("lines", title.format(loss_title(label)), (f"{prefix}{label}",))
                    for label in compared_with
                    for prefix, title in TO_REFERENCE.items()
                ),
            ),
        ),
        Section("Geometry by layer", "‖ΔW‖ of each layer.", _norms(sweep, of_layers=True), details=True),
        Section("Geometry by projection", "‖ΔW‖ of each projection.", _norms(sweep, of_layers=False), details=True),
        Section(
            "Accuracy",
            "Held-out problems, greedy answers, and the 95% interval of each run.",
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
            "Methods compared",
            "Each run by the end of its update.",
            (
                *(Panel("points", f"Accuracy on {name} and ‖ΔW‖", (NORM, accuracy(name))) for name in scored_on),
                *(
                    Panel("points", f"Cosine to {loss_title(label)} and ‖ΔW‖", (NORM, f"{COSINE}{label}"))
                    for label in compared_with
                ),
            ),
        ),
        Section(
            "Methods compared: the analysis",
            "What analyze.py found: every two arms and runs, and beside each measure what one loss would show.",
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
    """What every run logs while it trains, and what some losses do as far as a run has logged it."""
    some = {f"train/{name}": title for name, title in (descriptions.WITH_REFERENCE | diagnostic_titles()).items()}
    return TRAINING | {name: title for name, title in some.items() if name in sweep.names}


def benchmarks(sweep: LoggedSweep) -> list[str]:
    """What runs were scored on, by the files or by what was logged."""
    first, last = accuracy("|").split("|")
    logged = {name.removeprefix(first).removesuffix(last) for name in sweep.names if name.endswith(last)}
    return sorted({*sweep.benchmarks, *logged})


def accuracy(benchmark: str) -> str:
    """The name of the accuracy on a benchmark."""
    return f"eval/{benchmark}/accuracy"


def references(sweep: LoggedSweep) -> list[str]:
    """Labels of what updates were compared with; the usual one where nothing was yet."""
    labels = {name.removeprefix(COSINE) for name in sweep.names - GEOMETRY.keys() if name.startswith(COSINE)}
    return sorted(labels) or [_USUAL_REFERENCE]


def _norms(sweep: LoggedSweep, of_layers: bool) -> tuple[Panel, ...]:
    """A panel for each layer, or for each projection."""
    parts = [name.removeprefix(f"{NORM}/") for name in sweep.names if name.startswith(f"{NORM}/")]
    numbers = sorted(int(part.removeprefix(LAYER)) for part in parts if part.startswith(LAYER))
    titles = {f"{LAYER}{number}": f"layer {number}" if number >= 0 else "what is in no layer" for number in numbers}
    if not of_layers:
        titles = {part: part for part in sorted(parts) if part not in titles}
    return tuple(Panel("lines", f"‖ΔW‖ of {title}", (f"{NORM}/{part}",)) for part, title in titles.items())
