"""The dashboard of a sweep on W&B: a workspace and a report with the same panels, built with wandb-workspaces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from losslens.core.hashing import hash_json
from losslens.tables.style import METHODS, colour
from losslens.tracking.identity import LONGEST_NAME, fit_name
from losslens.tracking.logged_sweep import LoggedSweep
from losslens.tracking.panels import CHARTS, NORM, Panel, Section, accuracy, benchmarks, sections

_COLUMNS, _MAX_ROWS = 4, 4
# A report's grid is 24 units wide.
_FULL_WIDTH, _THIRD_WIDTH, _LOW, _HIGH = 24, 8, 6, 12
_MAX_LINES = 50
_RUNS, _ANALYSIS = "Runs", "Analysis"
# The chart that wandb.plot.line_series logs, and the columns of its table.
_LINES, _LINES_COLUMNS = "wandb/lineseries/v0", ("step", "lineKey", "lineVal")


def workspace(sweep: LoggedSweep, project: str, entity: str) -> ws.Workspace:
    """Builds the workspace: the runs of the sweep, one line per arm, in the colours of their losses.

    Its internal name on W&B, which is part of the URL, is derived from the sweep's name.
    """
    result = ws.Workspace(
        entity=entity,
        project=project,
        name=_title(sweep),
        sections=[
            ws.Section(
                name=section.title,
                panels=_panels(sweep, "workspace", section),
                is_open=not section.details,
                layout_settings=ws.SectionLayoutSettings(
                    columns=_COLUMNS, rows=min(_MAX_ROWS, -(-len(section.panels) // _COLUMNS))
                ),
            )
            for section in sections(sweep)
        ],
        settings=ws.WorkspaceSettings(max_runs=_MAX_LINES),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Metric("Group") == fit_name(sweep.name, LONGEST_NAME)),
            groupby=[expr.Config(key) for key in sweep.settings],
            group_colors={ws.GroupPath(*values): colour(values[0]) for values in _coloured(sweep)},
            pinned_columns=[f"summary:{name}" for name in (*map(accuracy, benchmarks(sweep)), NORM)],
        ),
    )
    result._internal_name = f"nw-{hash_json(['workspace', sweep.name], 11)}-v"
    result._internal_runset_id = hash_json(["workspace", sweep.name], 12)
    return result


def report(sweep: LoggedSweep, project: str, entity: str) -> wr.Report:
    """Builds the report: the panels of the workspace without details, with a sentence about each section.

    Its runs are those of the report's own project.
    """
    blocks: list[Any] = [wr.TableOfContents()]
    for section in sections(sweep):
        if not section.details:
            runs = _runset(sweep, section)
            blocks += [
                wr.H1(section.title),
                wr.P(section.text),
                wr.PanelGrid(
                    runsets=[runs],
                    panels=_laid_out(_panels(sweep, "report", section)),
                    custom_run_colors={} if section.of_analysis else _colours(sweep),
                ),
            ]
    return wr.Report(
        project=project,
        entity=entity,
        title=_title(sweep),
        # `publish` finds the report by this text.
        description=f"The sweep {sweep.name}. Made by launch/wandb_dashboard.py of LossLens, which replaces it.",
        width="fluid",
        blocks=blocks,
    )


def definition(sweep: LoggedSweep, project: str, entity: str) -> dict[str, Any]:
    """Returns workspace and report as W&B stores them, without network access; deterministic for a given sweep."""
    return {
        kind: {
            "entity": entity,
            "project": project,
            "name": model.display_name,
            "spec": json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)),
        }
        for kind, model in (
            ("workspace", workspace(sweep, project, entity)._to_model()),
            ("report", report(sweep, project, entity)._to_model()),
        )
    }


def _title(sweep: LoggedSweep) -> str:
    return f"LossLens {sweep.name}"[:128]  # the limit of a report's title


def _coloured(sweep: LoggedSweep) -> list[tuple[str, ...]]:
    """Groups of runs that have a colour: all losses, also those without runs yet, and all groups of their runs."""
    methods = [(method,) for method in METHODS]
    return list(dict.fromkeys([*methods, *(arm[:depth] for arm in sweep.arms for depth in range(1, len(arm) + 1))]))


def _colours(sweep: LoggedSweep) -> dict[wr.RunsetGroup, str]:
    """The colours of these groups in a report."""
    keys = [wr.Config(key) for key in sweep.settings]
    return {
        wr.RunsetGroup(_RUNS, tuple(map(wr.RunsetGroupKey, keys, values))): colour(values[0])
        for values in _coloured(sweep)
    }


def _runset(sweep: LoggedSweep, section: Section) -> wr.Runset:
    kind = "analysis" if section.of_analysis else "train"
    runset = wr.Runset(
        name=_ANALYSIS if section.of_analysis else _RUNS,
        filters=expr.And(expr.Metric("Group") == fit_name(sweep.name, LONGEST_NAME), expr.Metric("JobType") == kind),
        groupby=[] if section.of_analysis else [f"config.{key}" for key in sweep.settings],
    )
    runset._id = hash_json(["report", sweep.name, section.title], 12)
    return runset


def _panels(sweep: LoggedSweep, page: str, section: Section) -> list[Any]:
    panels = []
    for panel in section.panels:
        wandb_panel = _panel(panel)
        wandb_panel._id = hash_json([page, sweep.name, section.title, panel.title], 12)
        panels.append(wandb_panel)
    return panels


def _panel(panel: Panel) -> Any:
    names = list(panel.names)
    match panel.kind:
        case "lines":  # mean over seeds, with a band from the smallest to the largest
            return wr.LinePlot(
                title=panel.title, y=names, groupby_aggfunc="mean", groupby_rangefunc="minmax", smoothing_type="none"
            )
        case "bars":
            return wr.BarPlot(title=panel.title, metrics=names, groupby_aggfunc="mean", groupby_rangefunc="minmax")
        case "points":
            x, y = names
            return wr.ScatterPlot(title=panel.title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y))
        case "table":
            return wr.WeavePanelSummaryTable(table_name=names[0])
        case "chart":
            table: dict[str, Any] = {"summaryTable": {"tableKey": f"{names[0]}_table"}}
            return wr.CustomChart(
                query={"id": None, "name": None, "_defaultColorIndex": None, **table},
                chart_name=_LINES,
                chart_fields={column: column for column in _LINES_COLUMNS},
                chart_strings={"title": panel.title, "xname": CHARTS[names[0]][1]},
            )
        case "figures" | "page":
            return wr.MediaBrowser(title=panel.title, media_keys=names, num_columns=min(3, len(names)))


def _laid_out(panels: Sequence[Any]) -> list[Any]:
    """Places the panels of a report on its grid: three in a row, tables and media in rows of their own."""
    x = y = 0
    for panel in panels:
        wide = isinstance(panel, (wr.WeavePanelSummaryTable, wr.MediaBrowser))
        width, height = (_FULL_WIDTH, _HIGH) if wide else (_THIRD_WIDTH, _LOW)
        if x + width > _FULL_WIDTH:
            x, y = 0, y + _LOW
        panel.layout = wr.Layout(x=x, y=y, w=width, h=height)
        x, y = (x + width, y) if not wide else (0, y + height)
    return list(panels)
