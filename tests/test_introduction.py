"""Presentation of losses in tables and plots, built-in and external."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from losslens.core.errors import InputError
from losslens.losses import builtin_losses, builtin_methods
from losslens.losses.presentation import (
    Presentation,
    builtin_presentations,
    get_presentation,
    manifest_entry,
    presentation_of,
    register_from_manifest,
)
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import _OTHERS, METHODS, colour, in_plot_order, loss_title
from losslens.tracking.logged_sweep import logged_sweep
from tests.own_loss import Half
from tests.slow_method import SlowSft

pytestmark = pytest.mark.fast

TOLD = manifest_entry(Half(name="half"))


def test_external_loss_is_shown_as_its_manifest_says(tmp_path: Path) -> None:
    """From the manifest of an analysis, where nothing is imported."""
    assert json.loads(json.dumps(TOLD)) == TOLD
    (tmp_path / "manifest.json").write_text(json.dumps({"losses": {"half": TOLD}}))
    AnalysisFolder(tmp_path)
    assert (loss_title("half"), colour("half")) == ("½ SFT", "#123456")
    assert get_presentation("half").summary == "Half of supervised fine-tuning."
    assert in_plot_order(["half", "dpo", "sft"]) == ["sft", "dpo", "half"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"title": ""},
        {"title": "\u200b\n"},
        {"title": "x" * 101},
        {"title": "DPO"},
        {"colour": "red;background:url(http://x)"},
        {"summary": 5},
        {"place": "first"},
        {"place": float("nan")},
        {"diagnostic_titles": {"x": 5}},
        {"diagnostic_titles": ["x"]},
    ],
    ids=str,
)
def test_invalid_values_are_dropped(wrong: Any) -> None:
    register_from_manifest("odd", {**TOLD, **wrong})
    [field] = wrong
    instead = {"title": "odd", "place": None, "diagnostic_titles": {}}.get(field, "")
    expected = {**Presentation(**TOLD).model_dump(), field: instead}
    assert get_presentation("odd").model_dump() == expected


@pytest.mark.parametrize("told", [{}, [], None, "half"])
def test_invalid_entries_are_ignored(told: Any) -> None:
    register_from_manifest("none", told)
    assert get_presentation("none") == Presentation(title="none")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"colour": "orange"}, "Wrong.colour: "),
        ({"title": "DPO"}, "Wrong.title: DPO is the title"),
        ({"title": "x" * 101}, "Wrong.title: "),
    ],
)
def test_invalid_presentation_is_refused(wrong: dict[str, str], message: str) -> None:
    kind = type("Wrong", (Half,), wrong)
    with pytest.raises(InputError, match=message):
        presentation_of(kind(name="half"))


def test_builtin_presentations_cannot_be_replaced(tmp_path: Path) -> None:
    register_from_manifest("sft", {**TOLD, "title": "RFT"})
    assert loss_title("sft") == "SFT"
    assert list(builtin_presentations())[:2] == ["sft", "rft"]
    assert builtin_presentations().keys() == builtin_methods().keys() > builtin_losses().keys()


def test_control_characters_are_removed_from_titles() -> None:
    register_from_manifest("steers", {**TOLD, "title": "a\x1b]0;x\x07b\u202e"})
    assert loss_title("steers") == "a]0;xb"


def test_subclass_of_a_builtin_loss_inherits_no_presentation() -> None:
    assert presentation_of(SlowSft(name="slow_sft")) == Presentation(title="slow_sft")
    assert presentation_of(builtin_losses()["simpo"](name="simpo")) == builtin_presentations()["simpo"]


def test_fallback_colours_are_not_those_of_builtin_losses() -> None:
    assert not set(_OTHERS) & set(METHODS.values())


def test_dashboard_reads_it_from_the_runs(tmp_path: Path) -> None:
    config = {"method": {"name": "third", "_target_": "mine.Third"}, "seed": 1}
    manifest = {"identity": {"method": {"name": "third"}}, "config": config, "learning_rate": 1e-3}
    folder = tmp_path / "main" / "third-1"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "completed"}')
    (folder / "manifest.json").write_text(json.dumps({**manifest, "loss": {**TOLD, "title": "Third"}}))
    [run] = logged_sweep(tmp_path, "main").runs
    assert (loss_title(run.method), colour(run.method)) == ("Third", "#123456")
