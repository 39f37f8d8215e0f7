"""How losses introduce themselves, those outside the package too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from losslens.losses import own_losses
from losslens.losses.introduction import as_told, introduction, own_introductions, tell
from losslens.report.folder import AnalysisFolder
from losslens.report.style import colour, in_order, name_of
from tests.own_loss import Half

TOLD = as_told(Half(name="half"))


def test_a_loss_outside_the_package_is_shown_as_it_says(tmp_path: Path) -> None:
    """From the manifest of an analysis, where nothing is imported."""
    assert json.loads(json.dumps(TOLD)) == TOLD
    (tmp_path / "manifest.json").write_text(json.dumps({"losses": {"half": TOLD}}))
    AnalysisFolder(tmp_path)
    assert (name_of("half"), colour("half")) == ("½ SFT", "#123456")
    assert introduction("half").summary == "Half of supervised fine-tuning."
    assert in_order(["half", "dpo", "sft"]) == ["sft", "dpo", "half"]


@pytest.mark.parametrize(
    "told",
    [
        {**TOLD, "title": ""},
        {**TOLD, "title": "x" * 41},
        {**TOLD, "colour": "red;background:url(http://x)"},
        {**TOLD, "summary": 5},
        {**TOLD, "place": "first"},
        {},
        [],
        None,
        "half",
    ],
)
def test_what_is_no_introduction_is_none(told: Any) -> None:
    tell("odd", told)
    assert introduction("odd").title == "odd"
    assert introduction("odd").colour == ""


def test_nobody_speaks_for_losslens_own(tmp_path: Path) -> None:
    tell("sft", {**TOLD, "title": "RFT"})
    assert name_of("sft") == "SFT"
    assert list(own_introductions())[:2] == ["sft", "rft"]
    assert own_introductions().keys() == own_losses().keys()


def test_a_title_steers_no_terminal() -> None:
    tell("steers", {**TOLD, "title": "a\x1b]0;x\x07b\u202e"})
    assert name_of("steers") == "a]0;xb"
