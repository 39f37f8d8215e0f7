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
from losslens.analysis.replacement import write_analysis
from losslens.core.errors import InputError
from losslens.core.files import write_json, write_text
from losslens.losses.sft import Sft
from losslens.models.loading import LoadedModel
from losslens.runs import run as run_module
from losslens.runs.links import OWNER
from losslens.runs.run import Run
from losslens.training import callbacks
from losslens.training.callbacks import Metrics
from losslens.training.run import last_checkpoint
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


def _linked(run: Path, name: str, elsewhere: Path) -> None:
    run.mkdir(exist_ok=True)
    elsewhere.mkdir(exist_ok=True)
    (run / name).symlink_to(elsewhere)


@pytest.mark.parametrize("name", ["checkpoints", "snapshots", "eval"])
def test_a_linked_folder_of_a_run_must_be_its_own(name: str, tmp_path: Path) -> None:
    """A stranger's run folder may link to another run's files; a user's own link leads to an empty folder at first."""
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "sft-00000001"
    _linked(run, name, elsewhere)
    (elsewhere / "checkpoint-5").mkdir()
    refused = pytest.raises(InputError, match=rf"{name}: a link to .*elsewhere, whose files may be another's; remove")
    with refused, Run(run).lock():
        raise AssertionError
    assert [entry.name for entry in elsewhere.iterdir()] == ["checkpoint-5"]
    (elsewhere / "checkpoint-5").rmdir()
    with Run(run).lock():
        (elsewhere / "checkpoint-6").mkdir()
    with Run(run).lock():  # again: now it is its own
        pass
    other = tmp_path / "dpo-00000002"
    _linked(other, name, elsewhere)
    with pytest.raises(InputError, match="whose files may be another's"), Run(other).lock():
        pass
    with pytest.raises(InputError), Run(other / "snapshots" / "norm-0.1").lock():
        raise AssertionError


def test_a_link_that_leads_nowhere_is_one_line(tmp_path: Path) -> None:
    run = tmp_path / "sft-00000001"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="a link that leads to no folder; make that folder"), Run(run).lock():
        raise AssertionError


def test_the_name_of_a_runs_owner_is_not_written_through_a_link(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "sft-00000001"
    _linked(run, "eval", elsewhere)
    (elsewhere / OWNER).symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="whose files may be another's"), Run(run).lock():
        raise AssertionError
    assert not (tmp_path / "victim").exists()


def test_checkpoints_on_another_disk_are_removed_and_the_link_stays(tmp_path: Path) -> None:
    elsewhere, run, foreign = tmp_path / "scratch", tmp_path / "sft-00000001", tmp_path / "foreign"
    _linked(run, "checkpoints", elsewhere)
    with Run(run).lock():
        (elsewhere / "checkpoint-1").mkdir()
        (elsewhere / "checkpoint-1" / "optimizer.pt").touch()
        foreign.mkdir()
        (foreign / "kept").touch()
        (elsewhere / "checkpoint-2").symlink_to(foreign)
        Run(run).remove_checkpoints()
    assert [entry.name for entry in elsewhere.iterdir()] == [OWNER]
    assert (run / "checkpoints").is_symlink()
    assert (foreign / "kept").exists()


def test_checkpoints_that_cannot_be_removed_do_not_fail_a_trained_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, run = tmp_path / "scratch", tmp_path / "sft-00000001"
    _linked(run, "checkpoints", elsewhere)
    for step in (1, 2):
        (elsewhere / f"checkpoint-{step}").mkdir()

    def busy(entry: Path) -> None:
        if entry.name == "checkpoint-1":
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        entry.rmdir()

    monkeypatch.setattr(run_module, "remove_entry", busy)
    Run(run).remove_checkpoints()
    assert [entry.name for entry in elsewhere.iterdir()] == ["checkpoint-1"]


def test_the_root_of_a_disk_may_hold_checkpoints(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "scratch", tmp_path / "sft-00000001"
    _linked(run, "checkpoints", elsewhere)
    (elsewhere / "lost+found").mkdir()
    (elsewhere / ".nfs0000a").touch()
    with Run(run).lock():
        assert (elsewhere / OWNER).read_text() == "sft-00000001\n"
    # Another run is not let in, and another machine that writes its name at the same moment is found.
    _linked(tmp_path / "dpo-00000002", "checkpoints", elsewhere)
    with pytest.raises(InputError, match="whose files may be another's"), Run(tmp_path / "dpo-00000002").lock():
        raise AssertionError


def test_a_checkpoint_or_snapshot_that_is_a_link_is_removed_without_what_it_leads_to(tmp_path: Path) -> None:
    foreign, checkpoints = tmp_path / "foreign", tmp_path / "checkpoints"
    for folder in (foreign, checkpoints):
        folder.mkdir()
    (foreign / "kept").touch()
    (checkpoints / "checkpoint-3").symlink_to(foreign)
    assert last_checkpoint(checkpoints, "x") is None
    (tmp_path / "step-000004").symlink_to(foreign)
    snapshots = callbacks.Snapshots(tmp_path, 1, "x")
    snapshots.on_train_begin(None, SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
    assert not any(entry.is_symlink() for entry in [*checkpoints.iterdir(), *tmp_path.iterdir()])
    assert (foreign / "kept").exists()


def test_an_analysis_folder_that_is_a_link_is_not_replaced(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (tmp_path / "analysis").symlink_to(elsewhere)
    with pytest.raises(InputError, match="analysis: a link, which the new analysis would replace; remove it"):
        write_analysis(tmp_path / "analysis", lambda _: pytest.fail("analysed"))
    assert (elsewhere / "kept").exists()


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
