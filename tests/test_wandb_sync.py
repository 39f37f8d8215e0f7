"""`launch/wandb_sync.py` against a server: everything arrives once; failures are kept and reported."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import wandb
from filelock import FileLock

from launch.wandb_sync import main
from losslens.runs.run import Run
from tests.conftest import ROOT, script
from tests.wandb_server import WandbServer

QUIET: dict[str, Any] = {
    "console": "off", "disable_git": True, "x_disable_machine_info": True, "x_disable_meta": True,
    "x_save_requirements": False, "program": "train.py", "silent": True,
}  # fmt: skip


def offline_run(folder: Path, number: int = 0, job_type: str = "train", **more: Any) -> Any:
    """An offline run, still open, of five steps."""
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project="losslens",
        group="main",
        job_type=job_type,
        name=folder.name,
        dir=folder,
        config={"number": number},
        **{"mode": "offline", "settings": wandb.Settings(**QUIET), "reinit": "create_new", **more},
    )
    for step in range(5):
        run.log({"train/loss": number + step / 8}, step=step)
    return run


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a sweep of a hundred offline runs."""
    output_dir = tmp_path_factory.mktemp("hundred")
    for number in range(100):
        offline_run(output_dir / "main" / f"run-{number}", number).finish()
    wandb.teardown()
    return output_dir


@pytest.fixture
def some(hundred: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Makes the output folder of a sweep of some of them, which were not sent yet."""

    def make(count: int) -> Path:
        for number in range(count):
            there = tmp_path / "outputs" / "main" / f"run-{number}"
            shutil.copytree(hundred / "main" / there.name, there, symlinks=True)
            for mark in there.rglob("*.wandb.*"):
                mark.unlink()
        return tmp_path / "outputs"

    return make


def wandb_file(output_dir: Path, name: str) -> Path:
    [file] = (output_dir / "main" / name).glob("wandb/*run-*/*.wandb")
    return file


def wait_for_its_end(folder: Path) -> None:
    """Of a run that is finished, its process not."""
    [log] = folder.glob("wandb/*run-*/logs/debug-internal.log")
    while "all finished" not in log.read_text(encoding="utf-8"):
        time.sleep(0.01)


def losses(run: dict[str, Any]) -> list[float]:
    return [row["train/loss"] for row in run["history"]]


def is_whole(run: dict[str, Any]) -> bool:
    number = run["config"]["number"]["value"]
    return losses(run) == [number + step / 8 for step in range(5)] and run["state"] == "finished"


def test_a_hundred_runs_arrive_once(hundred: Path, wandb_server: WandbServer) -> None:
    outcome = script("launch/wandb_sync.py", f"output_dir={hundred}")
    assert "sweep main: sent 100 of 100" in outcome.stdout
    seen, requests = wandb_server.seen(), wandb_server.requests()
    runs = list(seen["runs"].values())
    assert {run["name"] for run in runs} == {f"run-{number}" for number in range(100)}
    for run in runs:
        assert is_whole(run)
        assert run["repeated"] == 0
        assert (run["project"], run["group"], run["job_type"]) == ("losslens", "main", "train")
        assert run["name"] == f"run-{run['config']['number']['value']}"
        assert run["summary"]["train/loss"] == losses(run)[-1]
    assert seen["missing"] == []
    times = {id: [each["at"] for each in requests if id in each["path"] + each["body"]] for id in seen["runs"]}
    spans = sorted((min(at), max(at)) for at in times.values())
    assert any(later[0] < earlier[1] for earlier, later in pairwise(spans))  # several at a time
    # Nothing of the machine that sends.
    assert {(run["host"], run["program"]) for run in runs} == {(None, "wandb_sync.py")}
    assert not any(str(place) in request["body"] for request in requests for place in (ROOT, hundred))

    outcome = script("launch/wandb_sync.py", f"output_dir={hundred}")
    assert outcome.stdout == "sweep main: nothing to send (100 sent before)\n"
    assert len(wandb_server.requests()) == len(requests)


def test_failed_segments_are_kept_and_reported(
    some: Callable[[int], Path], wandb_server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = some(6)
    damaged, refused, without_files = (wandb_file(output_dir, f"run-{number}") for number in (1, 2, 3))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:900] + b"\xff" * 200 + whole[1100:])
    wandb_server.fail(
        {"match": f"POST /files/.*{refused.stem.removeprefix('run-')}", "status": 400, "message": "no room left"},
        # Of this wandb itself says nothing at all.
        {"match": f"PUT .*{without_files.stem.removeprefix('run-')}/config.yaml", "status": 403},
    )
    assert main([f"output_dir={output_dir}"]) == 1
    said = capsys.readouterr()
    assert "sent 3 of 6" in said.out
    lines = [line for line in said.err.splitlines() if line.startswith("wandb_sync.py:")]
    for line, file, why in zip(
        lines, (damaged, refused, without_files), ("checksum mismatch", "no room left", "403 Forbidden"), strict=True
    ):
        assert f"{file.parent.relative_to(output_dir / 'main')} stays: " in line
        assert why in line
    runs = {run["name"]: run for run in wandb_server.seen()["runs"].values()}
    assert all(is_whole(runs[f"run-{number}"]) for number in (0, 4, 5))
    unsent = [file for file in output_dir.rglob("*.wandb") if not file.with_suffix(".wandb.synced").exists()]
    assert set(unsent) == {damaged, refused, without_files}

    wandb_server.fail()
    damaged.write_bytes(whole)
    asked_before = len(wandb_server.requests())
    assert main([f"output_dir={output_dir}"]) == 0
    assert "sent 3 of 3" in capsys.readouterr().out
    seen = wandb_server.seen()["runs"].values()
    assert len(seen) == 6
    assert all(is_whole(run) and "config.yaml" in run["files"] for run in seen)
    again = "".join(each["path"] + each["body"] for each in wandb_server.requests()[asked_before:])
    assert not any(wandb_file(output_dir, f"run-{number}").stem[4:] in again for number in (0, 4, 5))


def test_interrupted_or_grown_segments_are_sent_again(
    some: Callable[[int], Path], wandb_server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = some(3)
    assert main([f"output_dir={output_dir}"]) == 0
    interrupted, grown, by_hand = (wandb_file(output_dir, f"run-{number}") for number in range(3))
    interrupted.with_suffix(".wandb.sending").touch()  # killed, while wandb marked it
    whole = grown.read_bytes()
    grown.with_suffix(".wandb.synced").write_text(f"{len(whole) - 100}\n", encoding="utf-8")
    by_hand.with_suffix(".wandb.synced").write_text("", encoding="utf-8")  # as `wandb sync` marks
    capsys.readouterr()
    assert main([f"output_dir={output_dir}"]) == 0
    assert "sent 2 of 2" in capsys.readouterr().out
    runs = {run["name"]: run for run in wandb_server.seen()["runs"].values()}
    assert all(is_whole(run) for run in runs.values())
    assert [runs[f"run-{number}"]["repeated"] for number in range(3)] == [5, 5, 0]
    assert main([f"output_dir={output_dir}"]) == 0
    assert "nothing to send (3 sent before)" in capsys.readouterr().out


def test_active_runs_are_left_for_later(
    some: Callable[[int], Path], wandb_server: WandbServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output_dir = some(2)
    held = Run(output_dir / "main" / "run-0")
    analysis = offline_run(output_dir / "main" / "analysis", job_type="analysis")
    offline_run(output_dir / "main" / "run-1" / "eval", job_type="eval").finish()
    wait_for_its_end(output_dir / "main" / "run-1" / "eval")
    with FileLock(held.lock_file):
        assert main([f"output_dir={output_dir}"]) == 0
    said = capsys.readouterr().out
    assert said.count("still at work; left for later") == 2
    assert "run-0/wandb" in said
    assert "analysis/wandb" in said
    assert {run["name"] for run in wandb_server.seen()["runs"].values()} == {"run-1", "eval"}
    analysis.finish()
    wandb.teardown()
    assert main([f"output_dir={output_dir}"]) == 0
    assert "sent 2 of 2" in capsys.readouterr().out
    assert all(is_whole(run) for run in wandb_server.seen()["runs"].values())


def test_segments_of_killed_processes_are_sent(
    wandb_server: WandbServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = """
import sys, time, wandb
settings = wandb.Settings(silent=True, console="off", x_transaction_log_flush_interval=0.1)
run = wandb.init(project="losslens", dir=sys.argv[1], config={"number": 0}, mode="offline", settings=settings)
for step in range(5):
    run.log({"train/loss": step / 8}, step=step)
time.sleep(1)
print("ready", flush=True)
time.sleep(60)
"""
    folder = tmp_path / "main" / "run-0"
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    file = wandb_file(tmp_path, "run-0")
    os.utime(file, (0, 0))  # a minute has passed
    data = file.read_bytes()
    file.write_bytes(data + b"\x01\x02\x03\x04\x50\x00\x01half an entry")
    offline_run(tmp_path / "main" / "run-0", number=7).finish()  # it is gone on with
    at_once = tmp_path / "main" / "run-1" / "wandb" / "offline-run-20260101_000000-abc" / "run-abc.wandb"
    at_once.parent.mkdir(parents=True)
    at_once.write_bytes(data[:7])  # killed before it wrote anything
    os.utime(at_once, (0, 0))
    wandb.teardown()
    assert main([f"output_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert f"{file.parent.relative_to(tmp_path / 'main')}: its last entry is incomplete" in said
    assert "sent 2 of 2" in said
    killed, whole = sorted(wandb_server.seen()["runs"].values(), key=lambda run: run["config"]["number"]["value"])
    assert losses(killed) == [step / 8 for step in range(len(killed["history"]))]
    assert killed["state"] == "failed"
    assert is_whole(whole)


def test_interrupted_uploads_of_online_runs_are_sent(
    wandb_server: WandbServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    online: dict[str, Any] = {"mode": "online", "resume": "allow"}
    brief = wandb.Settings(**QUIET, finish_timeout=1, x_file_stream_transmit_interval=0.1)
    offline_run(tmp_path / "main" / "run-0", id="whole", **online).finish()
    killed = offline_run(tmp_path / "main" / "run-2", number=2, id="killed", **online)
    log = Path(killed.settings.log_internal)
    killed.finish(exit_code=1)
    offline_run(tmp_path / "main" / "run-2", number=2, id="killed", **online).finish()  # gone on with
    wandb.teardown()
    log.write_text("".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[:-6]), encoding="utf-8")
    cut = offline_run(tmp_path / "main" / "run-1", number=1, id="cut", **online | {"settings": brief})
    wandb_server.fail({"status": 500})
    cut.finish()
    wandb.teardown()
    wandb_server.fail()
    assert wandb_server.seen()["runs"]["cut"]["state"] == "running"
    assert main([f"output_dir={tmp_path}"]) == 0
    assert "sent 3 of 3" in capsys.readouterr().out
    runs = wandb_server.seen()["runs"]
    assert is_whole(runs["cut"])
    assert is_whole(runs["killed"])  # its last segment came last again
    assert is_whole(runs["whole"])
    assert runs["whole"]["repeated"] == 0
    assert main([f"output_dir={tmp_path}"]) == 0
    assert "nothing to send (4 sent before)" in capsys.readouterr().out


def test_artifacts_arrive_with_their_lineage(
    wandb_server: WandbServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter.bin"
    adapter.write_text("weights", encoding="utf-8")

    def artifact() -> Any:
        made = wandb.Artifact("adapter-run", "adapter")
        made.add_file(str(adapter), policy="immutable")
        return made

    analysis = offline_run(tmp_path / "main" / "analysis", job_type="analysis")  # begun before the run
    run = offline_run(tmp_path / "main" / "run", number=1)
    run.log_artifact(artifact())
    run.finish()
    analysis._log_artifact(artifact(), use_after_commit=True)
    analysis.finish()
    wandb.teardown()
    adapter.rename(tmp_path / "elsewhere")
    assert main([f"output_dir={tmp_path}", "parallel=2"]) == 1
    said = capsys.readouterr().err
    assert "run/wandb/" in said
    assert "analysis/wandb/" in said
    (tmp_path / "elsewhere").rename(adapter)
    assert main([f"output_dir={tmp_path}", "parallel=2"]) == 0
    seen = wandb_server.seen()
    [version] = [each for each in seen["artifacts"] if each["state"] == "COMMITTED"]
    assert version["files"] == {"adapter.bin": len("weights")}
    runs = {seen["runs"][id]["name"]: id for id in seen["runs"]}
    assert version["made_by"] == runs["run"]
    assert version["used_by"] == [runs["analysis"]]
    assert (
        len([each for each in wandb_server.requests() if each["method"] == "PUT" and "adapter.bin" in each["path"]])
        == 1
    )


def test_bad_input_and_no_server_in_one_line(
    some: Callable[[int], Path],
    wandb_server: WandbServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    output_dir = some(1)

    def said(*arguments: str, status: int) -> str:
        wandb.teardown()
        with pytest.raises(SystemExit) as end:
            sys.exit(main([f"output_dir={output_dir}", *arguments]))
        assert end.value.code == status
        [line] = [line for line in capsys.readouterr().err.splitlines() if "sending" not in line and line.strip()]
        assert line.startswith("wandb_sync.py: ")
        return line

    assert "sweep=other: no such sweep" in said("sweep=other", status=2)
    assert "parallel=0" in said("parallel=0", status=2)
    assert "sweeep=main: takes" in said("sweeep=main", status=2)
    wandb_server.fail({"status": 401, "message": "user is not logged in"})
    assert "not logged in" in said(status=2)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY")
    assert "wandb login" in said(status=2)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9: " in said(status=1)
    (output_dir / "empty").mkdir()
    assert main([f"output_dir={output_dir}", "sweep=empty"]) == 0
    assert capsys.readouterr().out == "sweep empty: nothing to send\n"
