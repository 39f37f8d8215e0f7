"""The doors to TRL's inside: one module has them all, and says which releases have them."""

from __future__ import annotations

import ast
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import trl

from losslens.core.errors import InputError
from losslens.losses.sft import Sft
from losslens.models.loading import LoadedModel, preserved
from losslens.training.run import make_trainer
from losslens.training.trl_internals import TESTED
from tests.conftest import ROOT, frozen_source
from tests.test_extras import PROJECT

PRIVATE = {
    "_metrics", "_total_train_tokens", "loss_is_scaled_for_ga", "model_accepts_loss_kwargs", "create_model_card",
    "_generate", "_generate_single_turn", "_generate_and_score_completions", "_tokenize_prompts", "eos_token_ids",
}  # fmt: skip


def test_the_releases_that_were_tested_are_those_that_are_asked_for() -> None:
    [asked] = [name for name in PROJECT["optional-dependencies"]["train"] if name.startswith("trl>")]
    major, minor = TESTED[-1].split(".")
    assert asked == f"trl>={TESTED[0]},<{major}.{int(minor) + 1}"
    assert len(TESTED) >= 2
    assert [f"{major}.{n}" for n in range(int(minor) - len(TESTED) + 1, int(minor) + 1)] == list(TESTED)


def test_a_fused_head_that_is_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """As with TRL 1.15 and no Triton; a head whose output are the logits needs none."""
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", None)
    plan = make_plan(Sft(name="sft"))
    source = frozen_source(plan, tokenised)
    with preserved(base.model):
        assert make_trainer(plan, base, source, tmp_path, [], selected_head=True)
    with preserved(base.model), pytest.raises(InputError, match=r"fused head.* needs Triton or trl>=1\.16"):
        make_trainer(plan, base, source, tmp_path, [], selected_head=False)


def test_the_installed_one_is_among_them() -> None:
    assert re.match(r"\d+\.\d+", trl.__version__)[0] in TESTED
    assert version("trl") == trl.__version__


def test_no_other_module_goes_through_them() -> None:
    for file in (ROOT / "src").rglob("*.py"):
        if file.name in ("trl_internals.py", "trl_on_policy.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module == "trl.rewards" or not (node.module or "").startswith("trl."), file  # documented
            elif isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("trl.")], file
            elif isinstance(node, ast.Attribute):
                assert node.attr not in PRIVATE, (file, node.lineno)
