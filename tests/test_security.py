"""What a stranger's files may not do, and an audit that is no verdict."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from losslens.analysis.gathering import _name
from losslens.analysis.manifests import Frozen, Named
from losslens.core.errors import InputError
from losslens.core.files import write_json, write_text
from losslens.losses.sft import Sft
from losslens.models.loading import LoadedModel
from losslens.runs.run import Run
from losslens.training import callbacks
from losslens.training.callbacks import Metrics
from tests.conftest import train_frozen
from tools.audit import verdict

pytestmark = pytest.mark.fast


class Malicious:
    """What runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("with_checksum", [False, True])
def test_a_checkpoint_runs_nothing(
    name: str, with_checksum: bool, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """Changed, it is passed over unread. With checksums made for it, it is still not unpickled."""

    def cut(step: int, values: dict[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    plan = make_plan(Sft(name="sft"), batch_size=4, max_steps=3, save_steps=1, log_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train_frozen(plan, base, tokenised, tmp_path, cut)
    [checkpoint] = (tmp_path / "checkpoints").glob("checkpoint-1")
    marker = tmp_path / "it ran"
    torch.save(Malicious(marker), checkpoint / name)
    torch.load(checkpoint / name, weights_only=False)
    marker.unlink()  # it would run
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(checkpoint / name, weights_only=True)
    if with_checksum:
        sealed = callbacks._checksums(plan.identity, 1, callbacks._hashes(checkpoint))
        write_json(checkpoint / "sealed.json", sealed)
        with pytest.raises(pickle.UnpicklingError):
            train_frozen(plan, base, tokenised, tmp_path)
    else:
        assert train_frozen(plan, base, tokenised, tmp_path)["resumed_from"] == 0
    assert not marker.exists()


def _audited(*ids: str) -> dict[str, Any]:
    return {"name": "a", "version": "1", "vulns": [{"id": name, "fix_versions": ["2"]} for name in ids]}


def test_an_audit_in_which_the_database_knew_no_package_fails() -> None:
    status, lines = verdict([{"name": "a", "skip_reason": "not found"}] * 2)
    assert status == 1
    assert lines == ["audit: the vulnerability database answered about none of 2 packages; nothing was audited"]


def test_an_audit_names_vulnerabilities_and_what_it_did_not_know() -> None:
    assert verdict([_audited()]) == (0, ["audit: 0 known vulnerabilities in 1 packages"])
    status, lines = verdict([_audited("CVE-1"), {"name": "b", "skip_reason": "not found"}])
    assert status == 1
    assert lines[0] == "a 1: CVE-1, mended in 2"
    assert lines[1].endswith("not audited: b")


@pytest.mark.parametrize("folder", ["..", ".", "/etc", "../x", "a/b", "a\\b", "a\nb", ""])
def test_a_manifest_names_no_folder_outside_the_output_folder(folder: str) -> None:
    with pytest.raises(ValidationError):
        Frozen(folder=folder, sha256="")


@pytest.mark.parametrize("name", ["..", "/etc/x", "../x", "a/b", "a\nb", "=1", "+1", "-1", "@a", "\ta", ""])
def test_a_name_in_a_manifest_is_the_name_of_a_file_and_no_formula(name: str) -> None:
    with pytest.raises(ValidationError):
        Named(name=name)


@pytest.mark.parametrize("name", ["=cmd|' calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1"])
def test_a_run_folder_whose_name_is_a_formula_is_not_written_into_tables(name: str) -> None:
    with pytest.raises(InputError, match="as a formula; rename the folder") as refused:
        _name(Run(Path("sweep", name)), several=False)
    assert str(refused.value).isprintable()


def test_nothing_is_written_through_a_symbolic_link_in_a_run_folder(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.write_text("kept")
    run.mkdir()
    for name in ("metrics.jsonl", "error.txt", "status.json"):
        (run / name).symlink_to(elsewhere)
    metrics = Metrics(run / "metrics.jsonl", 1, lambda _: {}, lambda *_: None)
    metrics.on_train_begin(SimpleNamespace(output_dir=str(run)), SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
    write_text(run / "error.txt", "x")
    write_json(run / "status.json", {}, in_place=True)
    assert elsewhere.read_text() == "kept"
    assert not any(file.is_symlink() for file in run.iterdir())


def test_a_full_disk_does_not_write_in_place_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    elsewhere, link = tmp_path / "elsewhere", tmp_path / "status.json"
    elsewhere.write_text("kept" * 2048)
    link.symlink_to(elsewhere)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_json(link, {}, in_place=True)
    assert elsewhere.read_text() == "kept" * 2048
