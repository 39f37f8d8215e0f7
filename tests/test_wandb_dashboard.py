"""The W&B dashboard: names, groups and colours, round trip, and the drawn picture."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
import wandb_workspaces.workspaces as ws
from PIL import Image
from wandb_workspaces._graphql import execute_graphql
from wandb_workspaces.reports.v2 import interface, internal
from wandb_workspaces.workspaces.internal import View, WorkspaceViewspec

from launch.wandb_dashboard import main
from losslens.losses.dpo import Dpo
from losslens.losses.sft import Sft
from losslens.report.figures.write import _FIGURES
from losslens.tables.descriptions import WITH_REFERENCE
from losslens.tables.style import METHODS
from losslens.tracking import analysis
from losslens.tracking.dashboard import definition, report, workspace
from losslens.tracking.logged_sweep import LoggedSweep, logged_sweep
from losslens.tracking.panels import CHARTS, FIGURES, GEOMETRY, TABLES, TO_REFERENCE, TRAINING, missing_data, sections
from tests.conftest import ROOT, train_frozen
from tests.wandb_server import ENTITY, WandbServer
from tools import dashboard_picture as picture

NORMS = ("geometry/norm/layer_0", "geometry/norm/layer_10", "geometry/norm/layer_2", "geometry/norm/q_proj")
OF_DPO = [f"train/{name}" for name in (*WITH_REFERENCE, *Dpo.diagnostic_titles)]
LOGGED = dict.fromkeys([*TRAINING, *OF_DPO, *GEOMETRY, *(f"{prefix}sft" for prefix in TO_REFERENCE), *NORMS], 1.0)
SCRIPT = [sys.executable, "launch/wandb_dashboard.py"]


def made(sweep: Path, name: str, lr: str = "conventional", seed: int = 0, **changes: Any) -> Path:
    """The folder of a run that was trained at the rate `lr` and scored, its method said by its name."""
    folder, method = sweep / f"{name}-s{seed}", name.partition("-")[0]
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "sums.parquet").touch()
    rate = 1e-4 if method == "dpo" and lr == "conventional" else 1e-3
    config = {"method": {"name": method, **changes}, "lr": {"name": lr, "peak": 1e-3}, "seed": seed, "init_seed": 1}
    identity = {"method": config["method"], "learning_rate": rate, "seed": seed, "init_seed": 1}
    facts = {"config": {**config, "output_dir": name}, "identity": identity, "learning_rate": rate}
    (folder / "manifest.json").write_text(json.dumps(facts))
    (folder / "status.json").write_text('{"state": "completed"}')
    lines = [{"step": step, **LOGGED, "geometry/norm": step + seed} for step in (5, 10)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A sweep `main` of SFT at two seeds and DPO at two rates, and the beginning of its analysis."""
    sweep = tmp_path / "outputs" / "main"
    for name, lr, seed in (
        ("sft", "conventional", 0), ("sft", "conventional", 1),
        ("dpo", "conventional", 0), ("dpo-matched", "matched", 0),
    ):  # fmt: skip
        made(sweep, name, lr, seed)
    rows = [(run.name, run.name[:3], "sums", 0.5, 0.4, 0.6) for run in sorted(sweep.iterdir())]
    runs = pd.DataFrame(rows, columns=["run", "method", "benchmark", "accuracy", "ci_low", "ci_high"])
    (sweep / "analysis").mkdir()
    runs.to_csv(sweep / "analysis" / "runs.csv", index=False)
    (sweep / "analysis" / "manifest.json").write_text('{"reference": "sft-s0"}')
    ways = pd.DataFrame({"run_a": "dpo-s0", "run_b": "sft-s0", "alpha": [0.0, 0.5, 1.0], "loss": [3.0, 2.0, 1.0]})
    ways.to_csv(sweep / "analysis" / "connectivity.csv", index=False)
    return tmp_path / "outputs"


@pytest.fixture
def logged(outputs: Path) -> LoggedSweep:
    return logged_sweep(outputs, "main")


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment in which nobody is logged in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "NETRC"}
    return {**kept, "HOME": str(tmp_path)}


def panels_of(model: Any) -> Iterator[Any]:
    """All panels of a workspace's or a report's spec."""
    if isinstance(model, WorkspaceViewspec):
        yield from (panel for section in model.section.panel_bank_config.sections for panel in section.panels)
    else:
        grids = [block.metadata for block in model.blocks if isinstance(block, internal.PanelGrid)]
        yield from (panel for grid in grids for panel in grid.panel_bank_section_config.panels)


def test_panels_show_what_training_logs(
    make_plan: Any, base: Any, tokenised: pd.DataFrame, outputs: Path, tmp_path: Path
) -> None:
    for method in (Sft(name="sft"), Dpo(name="dpo", beta=0.1)):
        folder = made(outputs / "real", method.name)
        train_frozen(make_plan(method, max_steps=3, log_steps=1), base, tokenised, folder)
    sweep = logged_sweep(outputs, "real")
    shown = {name for section in sections(sweep) for panel in section.panels for name in panel.names}
    unknown = {name for name in shown - sweep.names if name.startswith(("train/", "geometry/"))}
    assert unknown == {f"{prefix}sft" for prefix in TO_REFERENCE}  # nobody was given an adapter to compare with
    assert shown >= set(OF_DPO)
    assert sum(f"geometry/norm/layer_{layer}" in shown for layer in range(4)) == 4
    assert "geometry/norm/q_proj" in shown


def test_loss_specific_metrics_have_a_panel_once_logged(outputs: Path) -> None:
    """Under the title that the loss gives it, LossLens's own or one whose run tells of it."""
    folder = made(outputs / "plain", "surprise")
    manifest = json.loads((folder / "manifest.json").read_text())
    told = {"title": "Surprise", "diagnostic_titles": {"surprise/mean": "Surprise (nats)", "never": "Not logged"}}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "loss": told}))
    line = dict.fromkeys([*TRAINING, "train/surprise/mean", "train/kl", "train/untitled"], 1.0)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, **line}) + "\n")
    [training] = [section for section in sections(logged_sweep(outputs, "plain")) if section.title == "Training"]
    titles = {panel.names[0]: panel.title for panel in training.panels if panel.names[0] not in TRAINING}
    assert titles == {
        "train/surprise/mean": "Surprise (nats)",
        "train/kl": "KL estimate to the base: z₀ (nats)",
    }


def test_panels_show_what_the_analysis_logs() -> None:
    assert {f"tables/{name}" for name in analysis._TABLES} == set(TABLES)
    assert {name: columns for name, columns, _ in analysis._CURVES} == {
        name: (x, y) for name, (_, x, y) in CHARTS.items()
    }


def test_sections_follow_from_what_is_there(logged: LoggedSweep, outputs: Path) -> None:
    by_title = {section.title: section for section in sections(logged)}
    assert [panel.names[0] for panel in by_title["Geometry by layer"].panels] == [
        "geometry/norm/layer_0", "geometry/norm/layer_2", "geometry/norm/layer_10",
    ]  # fmt: skip
    assert [panel.title for panel in by_title["Geometry by projection"].panels] == ["‖ΔW‖ of q_proj"]
    assert by_title["Accuracy"].panels[0].names == ("eval/sums/accuracy",)
    assert missing_data(logged) == []
    assert tuple(name for name, _ in _FIGURES) == FIGURES
    for run in (outputs / "main").glob("*-s?"):
        (run / "metrics.jsonl").unlink()
        (run / "eval" / "sums.parquet").unlink()
    early = logged_sweep(outputs, "main")
    assert not {"Accuracy", "Geometry by layer"} & {section.title for section in sections(early)}
    left_out, empty = missing_data(early)
    assert left_out.endswith("Geometry by layer, Geometry by projection and Accuracy")
    assert empty.startswith("panels that stay empty until a run logs these metrics: train/loss, ")


def test_definition_needs_no_network(logged: LoggedSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("W&B was asked")

    monkeypatch.setattr(wandb, "Api", asked)
    both = definition(logged, "losslens", "me")
    assert both == definition(logged, "losslens", "me")
    shown = {name for section in sections(logged) for panel in section.panels for name in panel.names}
    for kind in ("workspace", "report"):
        assert both[kind]["name"] == "LossLens main"
        named = [panel["config"] for panel in _found(both[kind]["spec"], "viewType")]
        metrics = {name for config in named for name in (*config.get("metrics", ()), *config.get("mediaKeys", ()))}
        metrics |= {
            config[axis].removeprefix("summary:")
            for config in named
            for axis in ("xAxis", "yAxis")
            if config.get(axis, "_step") != "_step"
        }
        assert metrics <= shown
        assert {"train/loss", "geometry/cosine_to_sft", "eval/sums/ci_low", "report", "figures/cosines"} <= metrics
        tables = {table["tableKey"] for table in map(_argument, _found(both[kind]["spec"], "args")) if table}
        assert tables == {"connectivity_table", "cka_table"}
    details = {
        panel["config"]["metrics"][0]
        for panel in _found(both["report"]["spec"], "viewType")
        if "metrics" in panel["config"]
    }
    assert not details & set(NORMS)


def _found(value: Any, key: str) -> Iterator[dict[str, Any]]:
    """Every object in `value` that has `key`."""
    if isinstance(value, dict):
        if key in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _found(each, key)


def _argument(field: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each["value"] for each in field["args"] if each["name"] == "tableKey"}


def test_runs_are_those_of_the_sweep_an_arm_a_line_in_the_colours_of_methods(logged: LoggedSweep) -> None:
    assert logged.settings == ["method.name", "lr.name"]  # not the seed, and no path
    made = workspace(logged, "losslens", "me")
    assert made.runset_settings.filters == """Metric("Group") == 'main'"""
    keys = [(key.section, key.name) for key in made._to_model().spec.section.run_sets[0].grouping]
    assert keys == [("config", "method.value.name"), ("config", "lr.value.name")]
    colours = {tuple(path): colour for path, colour in made.runset_settings.group_colors.items()}
    assert colours == {(method,): colour for method, colour in METHODS.items()} | {
        ("sft", "conventional"): METHODS["sft"],
        ("dpo", "conventional"): METHODS["dpo"],
        ("dpo", "matched"): METHODS["dpo"],
    }
    grids = [block for block in report(logged, "losslens", "me").blocks if isinstance(block, interface.PanelGrid)]
    kinds = [grid.runsets[0].filters for grid in grids]
    assert kinds[0] == """Metric("Group") == 'main' and Metric("JobType") == 'train'"""
    assert kinds[-1] == kinds[0].replace("train", "analysis")
    sent = grids[0]._to_model().metadata
    assert (
        sent.custom_run_colors[f"{sent.run_sets[0].id}-config:method.value.name:dpo-config:lr.value.name:matched"]
        == (METHODS["dpo"])
    )


def test_one_arm_a_method_needs_no_further_key(outputs: Path) -> None:
    for name in ("rift", "sft"):
        made(outputs / "plain", name, seed=1)
        made(outputs / "plain", name, seed=2)
    # Neither what decides nothing, nor a seed, where what decided is not in the configuration.
    file = outputs / "plain" / "sft-s2" / "manifest.json"
    facts = json.loads(file.read_text())
    facts["config"]["optim"] = {"micro_batch": 4}
    file.write_text(json.dumps(facts))
    assert logged_sweep(outputs, "plain").arms == [("rift",), ("sft",)]
    file = outputs / "plain" / "rift-s2" / "manifest.json"
    file.write_text(file.read_text().replace('"identity": {', '"identity": {"rollouts": "others", '))
    assert logged_sweep(outputs, "plain").arms == [("rift",), ("sft",)]
    made(outputs / "plain", "rift-steep", seed=1, reward_incorrect=-0.5)
    made(outputs / "plain", "rift-steeper", seed=1, reward_incorrect=-1)
    assert logged_sweep(outputs, "plain").arms == [
        ("rift", "null"), ("rift", "-0.5"), ("rift", "-1"), ("sft", "null"),
    ]  # fmt: skip


def test_definition_survives_a_round_trip(logged: LoggedSweep) -> None:
    sent = workspace(logged, "losslens", "me")._to_model()
    spec = WorkspaceViewspec.model_validate_json(sent.spec.model_dump_json(by_alias=True, exclude_none=True))
    assert spec == sent.spec
    assert len(list(panels_of(spec))) == sum(len(section.panels) for section in sections(logged))
    again = ws.Workspace._from_model(View(**{**dict(sent), "spec": spec}))._to_model()
    assert again.spec.section.run_sets == sent.spec.section.run_sets
    assert again.spec.section.custom_run_colors == sent.spec.section.custom_run_colors
    assert again == sent

    written = report(logged, "losslens", "me")._to_model()
    text = written.spec.model_dump_json(by_alias=True, exclude_none=True)
    found = internal.ReportViewspec.model_validate({**dict(written), "spec": text})
    second = interface.Report._from_model(found)._to_model()
    # wandb-workspaces forgets where a table was, and how wide the report is.
    for panel, before in zip(panels_of(second.spec), panels_of(written.spec), strict=True):
        if isinstance(panel, internal.WeavePanel):
            panel.layout = before.layout
    second.spec.width = written.spec.width
    without_comments = [
        re.sub(r"'inline_comments': (None|\[\])", "", str(each.model_dump())) for each in (written, found)
    ]
    assert len(set(without_comments)) == 1
    assert second == written


def test_panels_of_the_report_do_not_overlap(logged: LoggedSweep) -> None:
    for block in report(logged, "losslens", "me").blocks:
        if isinstance(block, interface.PanelGrid):
            places = [panel.layout for panel in block.panels]
            cells = [(x, y) for at in places for x in range(at.x, at.x + at.w) for y in range(at.y, at.y + at.h)]
            assert len(cells) == len(set(cells))
            assert all(at.x + at.w <= 24 for at in places)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["swep=main"], "swep=main: takes sweep=…, project=…, entity=…, output_dir=…"),
        (["main"], "main: takes sweep="),
        (["sweep="], "sweep=: takes sweep="),
        (["sweep=none"], "sweep=none: no such sweep"),
        (["sweep=main/"], "sweep=main/: not the name of a sweep"),
        (["sweep=empty"], "sweep=empty: no run in"),
        (["sweep=torn"], "metrics.jsonl: line 1 is not a logged step"),
        (["sweep=odd"], "manifest.json: not the manifest of a run"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], told: str, outputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (outputs / "empty").mkdir()
    made(outputs / "plain", "sft")
    (made(outputs / "torn", "sft") / "metrics.jsonl").write_text('{"train/loss": 1}\n')
    (made(outputs / "odd", "sft") / "manifest.json").write_text('{"config": {}, "identity": {}, "learning_rate": 1}')
    monkeypatch.setattr(wandb, "Api", lambda: pytest.fail("W&B was asked"))
    try:
        status: Any = main([*arguments, f"output_dir={outputs}"])
    except SystemExit as ended:  # argparse's own
        status = ended.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.startswith("wandb_dashboard.py: ")
    assert told in printed.err
    assert printed.err.count("\n") == 1


def test_an_incomplete_line_is_ignored(outputs: Path) -> None:
    file = outputs / "main" / "sft-s0" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 15, "train/lo')
    [steps] = [run.steps for run in logged_sweep(outputs, "main").runs if run.name == "sft-s0"]
    assert [step["step"] for step in steps] == [5, 10]


def test_without_a_login_it_fails_without_a_prompt(outputs: Path, alone: dict[str, str]) -> None:
    ours, theirs = pty.openpty()  # as in a terminal, where wandb would ask for a key
    outcome = subprocess.run(
        [*SCRIPT, "sweep=main", f"output_dir={outputs}"],
        cwd=ROOT, env=alone, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, timeout=60,
    )  # fmt: skip
    os.close(theirs)
    told = os.read(ours, 10000).decode()
    os.close(ours)
    assert (outcome.returncode, outcome.stdout) == (2, b"")
    assert told == "wandb_dashboard.py: not logged in to W&B; run `wandb login` or set WANDB_API_KEY\r\n"


def test_a_dry_run_needs_no_login(outputs: Path, alone: dict[str, str], logged: LoggedSweep) -> None:
    arguments = ["sweep=main", f"output_dir={outputs}", "entity=me", "project=there", "--dry-run"]
    outcome = subprocess.run([*SCRIPT, *arguments], cwd=ROOT, env=alone, capture_output=True, text=True, check=True)
    assert json.loads(outcome.stdout) == definition(logged, "there", "me")
    assert outcome.stderr == ""


def test_saving_again_replaces_what_is_there(
    wandb_server: WandbServer, outputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = ["sweep=main", f"output_dir={outputs}"]
    assert main(arguments) == 2
    assert f"project=losslens: {ENTITY} has no such project on W&B" in capsys.readouterr().err
    api = wandb.Api()
    api.create_project("losslens", ENTITY)
    theirs = interface.Report(project="losslens", entity=ENTITY, title="LossLens main", description="mine").save()

    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    told = dict(line.split(": ", 1) for line in printed.out.splitlines())
    assert list(told) == ["workspace made", "report made"]
    views = {view["id"]: view for view in wandb_server.seen()["views"]}
    view, document = (each for each in views.values() if each["id"] != theirs.id)
    assert told["workspace made"].endswith(
        f"/{ENTITY}/losslens?nw={view['name'].removeprefix('nw-').removesuffix('-v')}"
    )
    assert told["report made"].endswith(f"/{ENTITY}/losslens/reports/LossLens-main--{document['id']}")
    sent = definition(logged_sweep(outputs, "main"), "losslens", ENTITY)
    assert view["spec"] == sent["workspace"]["spec"]
    places = [runs.pop("project") for runs in _found(document["spec"], "grouping")]
    assert {(place["entityName"], place["name"]) for place in places} == {(ENTITY, "losslens")}
    assert document["spec"] == sent["report"]["spec"]

    # As the app leaves a workspace that was opened in it: in a version that wandb-workspaces does not read.
    change = "mutation Change($input: UpsertViewInput!) { upsertView(input: $input) { view { id } } }"
    execute_graphql(api, change, {"input": {"id": view["id"], "spec": '{"version": 9}'}})
    made(outputs / "other", "sft")
    assert main(["sweep=other", f"output_dir={outputs}"]) == 0
    assert capsys.readouterr().out.count(" made: ") == 2
    assert main(arguments) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "workspace replaced", "report replaced",
    ]  # fmt: skip
    after = {view["id"]: view for view in wandb_server.seen()["views"]}
    assert len(after) == 5
    assert after[view["id"]]["spec"] == sent["workspace"]["spec"]
    assert after[theirs.id]["spec"] == views[theirs.id]["spec"]

    wandb_server.fail({"match": "upsertView", "status": 403})
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("wandb_dashboard.py: W&B: ")
    assert printed.err.count("\n") == 1
    assert wandb_server.seen()["missing"] == []


def test_the_picture_shows_what_the_dashboard_shows(
    outputs: Path, logged: LoggedSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    made(outputs / "plain", "sft")
    assert picture.main(["sweep=plain", f"output_dir={outputs}", f"file={outputs / 'x.png'}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("dashboard_picture.py: ")
    assert told.endswith("manifest.json: no such file\n")
    analysis = outputs / "main" / "analysis"
    assert picture.main(["sweep=main", f"output_dir={outputs}", f"file={outputs / 'w.png'}"]) == 0
    with Image.open(outputs / "w.png") as image:
        assert image.width == 1500
    drawn = picture._Picture(logged, picture.AnalysisFolder(analysis)).drawn()
    axes = {each.get_title(loc="left"): each for each in drawn.axes}
    texts = [text.get_text() for each in drawn.axes for text in each.texts]
    assert "Drawn by LossLens from the same data, not a screenshot of W&B" in texts
    for section in sections(logged):
        assert any(section.title in text for text in texts)
        assert section.details or {panel.title for panel in section.panels} <= axes.keys()
    # Of SFT's two seeds the mean; of DPO a line each rate.
    lines = {tuple(map(float, line.get_ydata())): line.get_color() for line in axes["‖ΔW‖"].lines}
    assert lines == {(5.5, 10.5): METHODS["sft"], (5.0, 10.0): METHODS["dpo"]}
    assert len(axes["‖ΔW‖"].lines) == 3
    assert [bar.get_height() for bar in axes["Accuracy on sums"].patches] == [0.5, 0.5, 0.5]
    [way] = axes["Connectivity: the loss between two runs"].lines
    assert dict(zip(way.get_xdata(), way.get_ydata(), strict=True)) == {1.0: 3.0, 0.5: 2.0, 0.0: 1.0}
    assert axes["CKA: hidden states by layer"].texts[0].get_text() == "no data yet"
