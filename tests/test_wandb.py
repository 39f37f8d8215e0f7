"""Runs and analyses on a W&B server; failures of W&B do not change the adapter."""

from __future__ import annotations

import getpass
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from losslens.config.parse import parse
from losslens.config.tracking import Logger
from losslens.config.training import TrainConfig
from losslens.pipeline.train_job import train_job
from losslens.runs.run import Run
from losslens.tracking import session
from tests.conftest import ROOT, start
from tests.wandb_server import KEY, WandbServer

SMALL = [
    "optim.max_steps=6",
    "optim.batch_size=8",
    "optim.save_steps=2",
    "optim.log_steps=2",
    "evaluation.max_tokens=64",
]


def overrides(output_dir: Path, frozen: Path, *others: str) -> list[str]:
    return [*SMALL, "data.eval_size=8", f"rollouts.path={frozen}", f"output_dir={output_dir}", *others]


def train(output_dir: Path, frozen: Path, *others: str) -> Run:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        outcome = train_job(parse(TrainConfig, compose("train", overrides(output_dir, frozen, *others))))
    assert outcome.state == "completed"
    return Run(output_dir / "main" / outcome.run)


def weights(run: Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def logged(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, rollouts: Any) -> tuple[Path, bytes]:
    """Frozen rollouts, and the adapter that SFT makes of them without W&B."""
    from losslens.rollouts.frozen import freeze

    folder = tmp_path_factory.mktemp("plain")
    frozen = freeze(rollouts, folder / "rollouts", "test", {"policy": "test"})
    return frozen, weights(train(folder, frozen, "logger=none"))


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B is not waited for as long as elsewhere."""
    monkeypatch.setattr(session, "_INIT_TIMEOUT", 2)
    monkeypatch.setattr(session, "_FINISH_TIMEOUT", 2)


def test_an_online_run(plain: tuple[Path, bytes], wandb_server: WandbServer, tmp_path: Path) -> None:
    frozen, expected = plain
    sft = train(tmp_path, frozen, "logger.mode=online")
    dpo = train(tmp_path, frozen, "logger.mode=online", "method=dpo", "logger.project=mine", "logger.entity=us")
    assert weights(sft) == expected
    seen = wandb_server.seen()
    runs = {run["name"]: run for run in seen["runs"].values()}
    assert runs.keys() == {sft.name, dpo.name}
    for run, project in ((sft, "tester/losslens"), (dpo, "us/mine")):
        there = runs[run.name]
        assert f"{there['entity']}/{there['project']}" == project
        assert (there["group"], there["job_type"], there["state"]) == ("main", "train", "finished")
        assert there["tags"] == [run.manifest["method"], "r8", "tiny"]
        config = {name: entry["value"] for name, entry in there["config"].items() if name != "_wandb"}
        facts = config.pop("losslens")
        assert config == {name: value for name, value in run.manifest["config"].items() if value != {}}
        assert facts["rollouts_sha256"] == run.manifest["rollouts"]["sha256"]
        lines = [{k: v for k, v in line.items() if k not in ("_timestamp", "_runtime")} for line in there["history"]]
        steps = [{"_step": line.pop("step"), **line} for line in logged(run)]
        scores = {name: lines[-1].pop(name) for name in list(lines[-1]) if name.startswith("eval/")}
        assert lines == steps
        assert scores["eval/arithmetic/n"] == there["summary"]["eval/arithmetic/n"] == 8
        assert scores["eval/arithmetic/ci_low"] < scores["eval/arithmetic/accuracy"] < scores["eval/arithmetic/ci_high"]
        assert there["summary"]["geometry/norm"] == steps[-1]["geometry/norm"]
        assert there["used"] == ["rollouts-" + frozen.name + ":v0"]
        assert there["logged"] == [f"adapter-{run.name}:v0"]
    assert "geometry/cosine_to_sft" in steps[-1]
    files = {artifact["name"]: artifact["files"] for artifact in seen["artifacts"]}
    assert files[f"adapter-{sft.name}"]["adapter_model.safetensors"] == len(expected)
    assert seen["missing"] == []


def test_nothing_private_is_sent(
    plain: tuple[Path, bytes], wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-secret-of-the-environment")
    monkeypatch.setenv("HOME", str(tmp_path))  # so that each path of the configuration is one in the home folder
    train(tmp_path / "out", plain[0], "logger.mode=online", "optim.max_steps=2")
    assert all(artifact["state"] == "COMMITTED" for artifact in wandb_server.seen()["artifacts"])
    sent = "\n".join(request["path"] + request["body"] for request in wandb_server.requests())
    assert "~/out" in sent
    for secret in (str(tmp_path), '"local_path":"..', "a-secret-of-the-environment", KEY, sys.executable):
        assert secret not in sent
    assert "requirements.txt" not in sent
    assert "wandb-metadata.json" not in sent
    assert f'"username":"{getpass.getuser()}"' not in sent.replace(" ", "")


def test_an_analysis(
    plain: tuple[Path, bytes], wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tables, curves, figures and report arrive, and whose adapters they are of; twice offline is once."""
    from analyze import load

    home = tmp_path / "of-alice"  # and what is sent lies elsewhere
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_DATA_DIR", str(home / "data"))
    out = tmp_path / "out"
    runs = [train(out, plain[0], "logger.mode=online", f"method={method}") for method in ("sft", "dpo")]
    job, _ = load()

    def analyse(mode: str) -> None:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            settings = [
                f"probe_set.completions={plain[0]}",
                "probe_set.problems=8",
                "connectivity.points=3",
                "connectivity.midpoint_problems=0",
            ]
            job(compose("analyze", [f"output_dir={out}", f"logger.mode={mode}", *settings]))

    for _ in range(2):
        analyse("offline")
    folder = out / "main" / "analysis"
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    analyse("online")
    seen = wandb_server.seen()
    [there] = [run for run in seen["runs"].values() if run["job_type"] == "analysis"]
    assert (there["name"], there["group"], there["state"]) == ("main-analysis", "main", "finished")
    assert sorted(there["used"]) == sorted(f"adapter-{run.name}:v0" for run in runs)  # uploads end in any order
    assert there["logged"][-1] == "analysis-main-analysis:v0"
    artifacts = {artifact["name"]: artifact for artifact in seen["artifacts"]}
    for run in runs:  # logged by the run, used by the analysis: one artifact
        adapter = artifacts[f"adapter-{run.name}"]
        assert len(adapter["logged_by"]) == 1
        assert len(adapter["used_by"]) == 1
    assert artifacts["analysis-main-analysis"]["files"].keys() >= {"report.html", "runs.csv", "modules.parquet"}
    assert not any("wandb" in name for name in artifacts["analysis-main-analysis"]["files"])
    assert there["summary"]["tables/runs"]["nrows"] == len(pd.read_csv(folder / "runs.csv"))
    assert {"connectivity_table", "cka_table", "tables/pairs", "tables/arms", "report"} <= there["summary"].keys()
    figures = {name.removeprefix("figures/") for name in there["summary"] if name.startswith("figures/")}
    assert figures == {file.stem for file in folder.glob("figures/*.png")} != set()
    assert seen["missing"] == []
    sent = "\n".join(request["path"] + request["body"] for request in wandb_server.requests())
    manifest = json.loads((folder / "manifest.json").read_text())
    for secret in (home.name, f'"host": "{manifest["machine"]["host"]}"', '"dirty_diff"'):
        assert secret not in sent.replace('\\"', '"')


@pytest.mark.parametrize("trouble", ["nobody", "silent", "lost", "artifacts", "no_key", "no_folder"])
def test_wandb_failures_warn_once_and_change_nothing(
    trouble: str,
    plain: tuple[Path, bytes],
    soon: None,
    wandb_server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen, expected = plain
    mode = "online"
    if trouble == "nobody":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    elif trouble == "silent":
        wandb_server.fail({"status": "silent"})
    elif trouble == "lost":
        wandb_server.fail({"match": "file_stream", "status": 500})
    elif trouble == "artifacts":
        wandb_server.fail({"match": "createArtifact", "status": "silent"})
    elif trouble == "no_key":
        monkeypatch.delenv("WANDB_API_KEY")
        monkeypatch.setenv("HOME", str(tmp_path))  # nor one in a file of this user
    else:
        mode = "offline"
        begin = session._open

        def in_the_way(settings: Any, output_dir: Path, folder: Path, about: Any) -> Any:
            (folder / "wandb").write_text("not a folder")
            return begin(settings, output_dir, folder, about)

        monkeypatch.setattr(session, "_open", in_the_way)
    with pytest.warns(UserWarning, match=r"W&B: .*the run continues without it") as warned:
        run = train(tmp_path / "out", frozen, f"logger.mode={mode}")
    assert len([warning for warning in warned if "W&B" in str(warning.message)]) == 1
    assert weights(run) == expected
    kept = [file.parent.name for file in run.folder.glob("wandb/*run-*/*.wandb")]
    assert [name.partition("-")[0] for name in kept] == {
        "lost": ["run"], "artifacts": ["run"], "no_folder": []
    }.get(trouble, ["offline"])  # fmt: skip


def test_a_recovered_failure_is_no_error(
    plain: tuple[Path, bytes], wandb_server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores come after the last step, whose numbers W&B has already."""
    with monkeypatch.context() as failing, pytest.raises(AssertionError):
        failing.setattr("losslens.pipeline.train_job.score_run", lambda *_: 1 / 0)
        train(tmp_path, plain[0], "logger.mode=online")
    [there] = wandb_server.seen()["runs"].values()
    assert (there["state"], there["summary"]["error"]) == ("failed", "ZeroDivisionError: division by zero")
    train(tmp_path, plain[0], "logger.mode=online")
    [there] = wandb_server.seen()["runs"].values()
    assert there["state"] == "finished"
    assert "error" not in there["summary"]
    assert [row["_step"] for row in there["history"]] == [2, 4, 6, 7]
    assert there["summary"]["eval/arithmetic/n"] == 8


def test_two_output_folders_of_one_process(
    plain: tuple[Path, bytes], wandb_server: WandbServer, tmp_path: Path
) -> None:
    for seed in (1, 2):
        train(tmp_path / str(seed), plain[0], "logger.mode=online", "optim.max_steps=2", f"seed={seed}")
    states = [artifact["state"] for artifact in wandb_server.seen()["artifacts"]]
    assert states == ["COMMITTED"] * 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that holds 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("only root may make a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_below_wandb_changes_nothing(
    plain: tuple[Path, bytes], small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = session._open

    def on_the_small_disk(settings: Any, output_dir: Path, folder: Path, about: Any) -> Any:
        (folder / "wandb").symlink_to(small_disk)
        (small_disk / "filling").write_bytes(b"0" * 50_000)
        return begin(settings, output_dir, folder, about)

    monkeypatch.setattr(session, "_open", on_the_small_disk)
    run = train(tmp_path / "out", plain[0], "optim.log_steps=1")
    assert weights(run) == plain[1]
    assert len(logged(run)) == 6


def test_a_killed_and_resumed_run_is_one_wandb_run(
    plain: tuple[Path, bytes], wandb_server: WandbServer, tmp_path: Path
) -> None:
    frozen, expected = plain
    slow = ["logger.mode=online", "method._target_=tests.slow_method.SlowSft", "method.name=slow_sft"]
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "SLOW_SECONDS": "1"}
    end = time.monotonic() + 120
    with start("train.py", *overrides(tmp_path, frozen, *slow), env=environment) as process:
        while not list(tmp_path.glob("main/*/checkpoints/checkpoint-2/sealed.json")):
            assert time.monotonic() < end
            assert process.poll() is None, process.stderr
            time.sleep(0.05)
    run = train(tmp_path, frozen, *slow)
    assert weights(run) == expected
    assert run.manifest["training"]["resumed_from"] >= 2
    [there] = wandb_server.seen()["runs"].values()
    assert there["resumed"] == 1
    assert [row["_step"] for row in there["history"] if "train/loss" in row] == [2, 4, 6]
    assert [row["geometry/norm"] for row in there["history"] if "train/loss" in row] == [
        row["geometry/norm"] for row in logged(run)
    ]
    assert there["state"] == "finished"


def test_a_resumed_run_clears_its_error(wandb_server: WandbServer, tmp_path: Path) -> None:
    settings = Logger(name="wandb", mode="online", project="p", entity=None, artifacts=True)
    about = session.RunInfo("main", "train", "run", [], {})
    with pytest.raises(RuntimeError), session.session(settings, tmp_path, tmp_path, about):
        raise RuntimeError("no luck")
    [there] = wandb_server.seen()["runs"].values()
    assert (there["state"], there["summary"]["error"]) == ("failed", "RuntimeError: no luck")
    with session.session(settings, tmp_path, tmp_path, about):
        pass
    [there] = wandb_server.seen()["runs"].values()
    assert (there["state"], there["summary"].get("error")) == ("finished", None)
