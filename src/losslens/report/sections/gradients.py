"""The gradients before step 1: what two losses share at the end, and how much of it they shared at the start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import plotly.graph_objects as go

from losslens.measures import Measure, get_measure
from losslens.report.components import Cell, Column, Figure, Finding, Row, Section, Table
from losslens.report.loss_comparison import ComparedLoss, LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import number
from losslens.tables.style import MUTED, colour, escape_markup, figure

_RUN_MEASURES = ("gradient_halves", "first_step", "sign_step")
# Most pairs whose names are written beside their points.
_MOST_NAMED = 15
# Smallest gap between two cosines that is worth a sentence.
_GAP = 0.1


@dataclass(frozen=True)
class _Pair:
    """Two losses: cosine of their gradients before step 1, and of their updates at the end.

    Attributes:
        name: Their names.
        methods: Their methods.
        start: The cosine of their gradients.
        null: Its null.
        across: The same between halves of the problems.
        ceiling: What `across` would be if the two were one loss.
        end: The cosine of their updates: of its ceiling where that is known, as the gradients are free of the noise of
            batches.
        of_ceiling: True if `end` is a share of its ceiling.
    """

    name: str
    methods: tuple[str, str]
    start: float
    null: float
    across: float
    ceiling: float
    end: float
    of_ceiling: bool

    @property
    def decided(self) -> float:
        """The part of the end that the start had: the smaller of the two cosines, 0 if their signs differ."""
        if self.start * self.end <= 0:
            return 0.0
        return min(self.start, self.end, key=abs)

    @property
    def grown(self) -> float:
        """The rest of the end, by its size."""
        return abs(self.end) - abs(self.decided)

    @property
    def lost(self) -> float:
        """The rest of the start, by its size."""
        return abs(self.start) - abs(self.decided)


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None unless gradients were computed of two losses."""
    comparison = LossComparison(analysis)
    pairs = [pair for a, b in combinations(comparison.losses, 2) if (pair := _pair(comparison, a, b))]
    if not pairs:
        return None
    return Section(
        "gradients",
        "Before step 1",
        text=[
            "The gradient of each loss at the initial adapter, over all rows that it trains on. What two losses share "
            "there was decided before training; where they end apart from the diagonal, training has brought them "
            "together or parted them."
        ],
        findings=_findings(pairs),
        figures=[
            Figure(
                "Start and end",
                "Each point is a pair of losses: the cosine of their gradients before step 1 and that of their final "
                "updates. On the diagonal the start decided the end; above it similarity grew, below it was lost.",
                _plot(pairs),
                wide=True,
            )
        ],
        tables=[_pair_table(pairs), *_run_table(analysis, comparison)],
        notes=[
            "The final updates differ by the noise of batches, the gradients do not: the cosine of the former is a "
            "share of its ceiling where that is known, else as it is (arm_pairs.csv says what the runs share).",
            "Decided at the start: the smaller of the two, 0 if their signs differ. Grown: the size of the rest of the "
            "end. Lost: that of the start. Across halves: the gradient of one loss on half of the problems with that "
            "of the other loss on the other half; in brackets what it would be if the two were one loss. It is lower "
            "than the start as far as the start comes from the problems that both losses meet.",
            "Adam divides each entry of the gradient by its size; its first step goes along the sign.",
        ],
    )


def _pair(comparison: LossComparison, a: ComparedLoss, b: ComparedLoss) -> _Pair | None:
    start, end = comparison.of("gradient_cosine", a, b), comparison.of("cosine", a, b)
    if not (start.known and end.known):
        return None
    across, ceiling = (comparison.of(name, a, b).value for name in ("gradient_across", "gradient_ceiling"))
    known = not math.isnan(end.relative)
    methods, value = (a.method, b.method), end.relative if known else end.value
    return _Pair(f"{a.name}–{b.name}", methods, start.value, start.null, across, ceiling, value, known)


def _findings(pairs: list[_Pair]) -> list[Finding]:
    most = max(pairs, key=lambda pair: abs(pair.end - pair.start))
    if abs(most.end - most.start) < _GAP:
        text = f"What the losses share was decided before step 1: no pair moved by {number(_GAP, 1)} or more in cosine."
        return [Finding(text, "gradients")]
    of = " of its ceiling" if most.of_ceiling else ""
    moved = f"cosine of gradients {number(most.start, 2)}, of final updates {number(most.end, 2)}{of}"
    return [Finding(f"{most.name} moved most from its start: {moved}.", "gradients")]


def _plot(pairs: list[_Pair]) -> go.Figure:
    plot = figure("cosine of the gradients before step 1", "cosine of the final updates", height=460)
    values = [value for pair in pairs for value in (pair.start, pair.end)]
    low, high = min(0.0, *values) - 0.05, max(*values) + 0.05
    plot.update_layout(xaxis_range=[low, high], yaxis_range=[low, high])
    line = {"color": MUTED, "width": 1}
    plot.add_scatter(x=[low, high], y=[low, high], mode="lines", line={**line, "dash": "dash"}, hoverinfo="skip")
    for zero in (plot.add_hline, plot.add_vline):
        zero(0, line=line)
    for pair in pairs:
        inside, edge = map(colour, pair.methods)
        plot.add_scatter(
            x=[pair.start], y=[pair.end], mode="markers+text" if len(pairs) <= _MOST_NAMED else "markers",
            text=[escape_markup(pair.name)], textposition="middle right", textfont={"size": 11}, hoverinfo="text",
            hovertext=[
                f"<b>{escape_markup(pair.name)}</b><br>start {number(pair.start)} (null ±{number(pair.null)})"
                f"<br>end {number(pair.end)}"
            ],
            marker={"size": 11, "color": inside, "line": {"color": edge, "width": 3}},
        )  # fmt: skip
    return plot


def _pair_table(pairs: list[_Pair]) -> Table:
    rows = [
        Row(
            [
                Cell(pair.name),
                Cell(number(pair.start), below=f"null ±{number(pair.null)}"),
                Cell(number(pair.across, 2), below=f"of {number(pair.ceiling, 2)}"),
                Cell(number(pair.end), below="of its ceiling" * pair.of_ceiling),
                *(Cell(number(v)) for v in (pair.decided, pair.grown, pair.lost)),
            ]
        )
        for pair in pairs
    ]
    headings = ("gradient cosine", "across halves", "end", "decided at the start", "grown", "lost")
    return Table("Pairs of losses", [Column("pair", numeric=False), *map(Column, headings)], rows)


def _run_table(analysis: AnalysisFolder, comparison: LossComparison) -> list[Table]:
    arms = analysis.table("arms", ("arm", "alias_of"), _RUN_MEASURES)
    arms = arms[arms["alias_of"] == ""].drop_duplicates("arm").set_index("arm")
    measures: list[Measure] = [get_measure(name) for name in _RUN_MEASURES]
    known = arms[arms[list(_RUN_MEASURES)].notna().any(axis=1)]
    rows = []
    for loss in comparison.losses:
        if loss.arm in known.index:
            cells = [Cell(measure.show(known.loc[loss.arm, measure.name])) for measure in measures]
            rows.append(Row([Cell(loss.name, colour=colour(loss.method)), *cells]))
    columns = [Column("loss", numeric=False), *(Column(measure.label) for measure in measures)]
    return [Table("Each loss by itself", columns, rows)] if rows else []
