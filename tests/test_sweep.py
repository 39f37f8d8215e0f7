"""End to end: a sweep of six losses, repeated, killed half-way, and with a failing run."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
from peft import PeftModel
from safetensors.numpy import load_file

from losslens.core.hashing import hash_file
from losslens.measures.comparison import compare
from losslens.measures.tables import ComparedWeights, weight_tables
from losslens.models.loading import LoadedModel, preserved
from losslens.runs.run import Run, runs_of
from losslens.updates.folder import open_adapter
from tests.conftest import METHODS, ROOT, cold, command, remove_outcomes, script, start
from tests.wandb_server import WandbServer

FEW = "data.eval_size=8"  # where nothing is about how well a run does


def adapters(output_dir: Path, sweep: str = "main") -> dict[str, str]:
    """The hash of each run's adapter, by its method."""
    folder = output_dir / sweep
    return {
        file.parents[1].name.split("-")[0]: hash_file(file)
        for file in folder.glob("*/adapter/adapter_model.safetensors")
    }


def test_every_run_is_complete_on_disk(sweep: Path) -> None:
    runs = runs_of(sweep, "main")
    assert len(runs) == 7
    assert cold("launch/status.py", "sweep=main", f"output_dir={sweep}").stdout.count("completed") == 7
    initial = set()
    for run in runs:
        outcomes = pd.read_parquet(run.evaluation("arithmetic"))
        assert list(outcomes.columns) == [
            "problem_id",
            "sample",
            "completion",
            "answer",
            "correct",
            "tokens",
            "finished",
        ]
        assert len(outcomes) == 40
        if run.name.startswith("base-"):
            continue
        assert run.status["state"] == "completed"
        assert run.status["adapter_sha256"] == hash_file(run.adapter / "adapter_model.safetensors")
        assert not run.checkpoints.exists()
        manifest = run.manifest
        assert {"share_mixed_groups", "pass_rate", "sha256"} <= manifest["rollouts"].keys()
        assert {"base", "code", "config", "identity", "machine", "versions", "started", "ended"} <= manifest.keys()
        initial.add(manifest["initial_adapter"]["sha256"])
        metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in metrics] == [2, 4, 6, 8, 10, 12]
        assert all(np.isfinite(line["train/loss"]) for line in metrics)
    assert len(initial) == 1


def test_an_adapter_is_a_plain_peft_folder(sweep: Path, base: LoadedModel) -> None:
    [folder] = (sweep / "main").glob("sft-*/adapter")
    with preserved(base.model):
        model = PeftModel.from_pretrained(base.model, folder)
        assert model.peft_config["default"].r == 8
        assert model.peft_config["default"].lora_alpha == 16
    b = [value for name, value in load_file(folder / "adapter_model.safetensors").items() if "lora_B" in name]
    assert all(np.abs(value).max() > 0 for value in b)


def test_all_that_is_logged_is_explained(sweep: Path) -> None:
    """Every name stands in docs/reference/metrics.md, and what stands there is logged by some method."""
    kinds = [(r"/layer_-?\d+$", "/layer_<i>"), (r"/\w+_proj$", "/<projection>"), (r"_to_sft$", "_to_<label>")]
    logged = set()
    for file in (sweep / "main").glob("*/metrics.jsonl"):
        for name in [name for line in file.read_text().splitlines() for name in json.loads(line) if name != "step"]:
            for pattern, kind in kinds:
                name = re.sub(pattern, kind, name)
            logged.add(name)
    explained = set()
    group = ""
    for line in (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## `(\w+)/`", line):
            group = heading[1]
        elif row := re.match(r"\| (`.*?) \|", line):
            explained |= {f"{group}/{name}" for name in re.findall(r"`([^`]+)`", row[1])}
    logged.add("train/kl")  # KTO's, which is not of this sweep: tests/test_trainers.py
    assert logged == explained


def test_wandb_reads_back_what_the_runs_are(sweep: Path, wandb_server: WandbServer) -> None:
    """`wandb sync`, W&B's own reader of its offline files, sends to a server what was logged."""
    script("launch/wandb_sync.py", "sweep=main", f"output_dir={sweep}")
    seen = wandb_server.seen()
    there = {run["name"]: run for run in seen["runs"].values()}
    runs = [run for run in runs_of(sweep, "main") if not run.name.startswith("base-")]
    assert there.keys() == {run.name for run in runs}
    for run in runs:
        found = there[run.name]
        assert (found["group"], found["job_type"], found["state"]) == ("main", "train", "finished")
        assert found["tags"] == [run.manifest["method"], "r8", "tiny"]
        config = {name: entry["value"] for name, entry in found["config"].items() if name not in ("_wandb", "losslens")}
        assert config == {name: value for name, value in run.manifest["config"].items() if value != {}}
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        rows = [
            {name: row[name] for name in line if name != "step"} | {"step": row["_step"]}
            for line, row in zip(lines, found["history"], strict=True)
        ]
        assert rows == lines
        assert 0 <= found["history"][-1]["eval/arithmetic/accuracy"] <= 1
        with open_adapter(run.adapter) as adapter, open_adapter(sweep / "init" / initial_of(run)) as start:
            [geometry], _ = compare([adapter], adapter.modules, initial=[start])
            shapes = [adapter[module].shape for module in adapter.modules]
        table = weight_tables(ComparedWeights(adapter.modules, shapes, {run.name: geometry}, {}, 10)).runs
        for name in ("norm", "effective_rank", "stable_rank", "drift_min", "drift_max"):
            value = table[name].item()
            assert np.isclose(found["history"][-1][f"geometry/{name}"], value, rtol=1e-9)
        # Of rollouts that came offline W&B takes the first run that used them for their maker.
        assert f"adapter-{run.name}:v0" in found["logged"]
        assert found["used"] == [f"rollouts-{run.manifest['rollouts']['folder']}:v0"]
    assert seen["missing"] == []
    again = script("launch/wandb_sync.py", "sweep=main", f"output_dir={sweep}")
    assert "nothing" in again.stdout


def initial_of(run: Run) -> str:
    return run.manifest["initial_adapter"]["folder"]


def test_the_same_sweep_again_trains_nothing(sweep: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (sweep / "main").glob("*/adapter/*")}
    outcome = script(*command(sweep, "-m", METHODS))
    assert outcome.stdout.count(": skipped") == 6
    assert {file: file.stat().st_mtime_ns for file in (sweep / "main").glob("*/adapter/*")} == before


def test_a_sweep_killed_in_its_third_run_resumes_byte_identically(sweep: Path, tmp_path: Path) -> None:
    arguments = command(tmp_path, "-m", "method=sft,rft,dft,grpo", FEW, "optim.save_steps=2", "logger=none")
    shutil.copytree(sweep / "rollouts", tmp_path / "rollouts")
    deadline = time.monotonic() + 240
    with start(*arguments) as process:
        while not list(tmp_path.glob("main/dft-*/checkpoints/checkpoint-*/sealed.json")):
            assert process.poll() is None, process.stderr
            assert time.monotonic() < deadline
            time.sleep(0.02)
    states = {run.name.split("-")[0]: run.status["state"] for run in runs_of(tmp_path, "main")}
    assert states == {"base": "completed", "sft": "completed", "rft": "completed", "dft": "running"}
    outcome = script(*arguments)
    assert outcome.stdout.count(": skipped") == 2
    [dft] = (tmp_path / "main").glob("dft-*")
    assert json.loads((dft / "manifest.json").read_text())["training"]["resumed_from"] >= 2
    there = adapters(sweep)
    assert adapters(tmp_path) == {method: there[method] for method in ("sft", "rft", "dft", "grpo")}


def test_a_run_alone_is_byte_identical_to_the_run_in_a_sweep(sweep: Path) -> None:
    script(*command(sweep, "method=dpo", "sweep=alone", FEW, "logger=none"))
    assert adapters(sweep, "alone") == {"dpo": adapters(sweep)["dpo"]}


def test_seeds_move_what_they_should(sweep: Path) -> None:
    """`init_seed` moves the initial adapter, `seed` only the order; both the result."""
    script(*command(sweep, "-m", "seed=42,1", "init_seed=42,1", "sweep=seeds", FEW, "logger=none"))
    runs = [run for run in runs_of(sweep, "seeds") if run.name.startswith("sft")]
    assert len({run.status["adapter_sha256"] for run in runs}) == 4
    initial = {run.manifest["config"]["init_seed"]: run.manifest["initial_adapter"]["sha256"] for run in runs}
    assert len(set(initial.values())) == 2
    for run in runs:
        assert run.manifest["initial_adapter"]["sha256"] == initial[run.manifest["config"]["init_seed"]]


def test_a_run_that_diverges_stops_no_other_and_is_kept(sweep: Path) -> None:
    """The rate of the second run is past all bounds; the third is trained, and the sweep says so; all of it once."""
    arguments = ("-m", "lr.peak=1e-3,1e30,2e-3", "optim.max_grad_norm=1e30", "sweep=diverging", FEW, "logger=none")
    outcome = script(*command(sweep, *arguments), check=1)
    states = {run.status["state"]: run for run in runs_of(sweep, "diverging") if run.name.startswith("sft")}
    assert [run.status["state"] for run in runs_of(sweep, "diverging")].count("completed") == 3
    diverged = states["failed"]
    assert diverged.status["diverged"] is True
    assert re.fullmatch(
        r"diverged: ((loss|grad_norm) is (nan|inf)|the norm of the update, .*) at step \d+", diverged.status["error"]
    )
    assert diverged.status["error"] in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert re.search(r"diverged", outcome.stdout)
    before = (diverged.folder / "status.json").stat().st_mtime_ns
    again = script(*command(sweep, *arguments), check=1)
    assert again.stdout.count(": skipped") == 2
    assert f"{diverged.status['error']}; to train it again, delete {diverged.folder}" in again.stderr
    assert (diverged.folder / "status.json").stat().st_mtime_ns == before


def test_a_run_that_fails_stops_no_other(sweep: Path) -> None:
    """A folder stands where the first run wants to write: it fails, with what went wrong; the second is trained."""
    [run] = [run for run in runs_of(sweep, "main") if run.name.startswith("sft")]
    in_the_way = sweep / "failing" / run.name / "metrics.jsonl"
    in_the_way.mkdir(parents=True)
    outcome = script(*command(sweep, "-m", "method=sft,rft", "sweep=failing", FEW, "logger=none"), check=2)
    states = {run.name[:3]: run for run in runs_of(sweep, "failing")}
    assert states["sft"].status["state"] == "failed"
    assert f"{in_the_way}: a folder is in the place of this file; delete it" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert states["rft"].status["state"] == "completed"
    in_the_way.rmdir()
    again = script(*command(sweep, "-m", "method=sft,rft", "sweep=failing", FEW, "logger=none"))
    assert again.stdout.count(": completed") == again.stdout.count(": skipped") == 1


def test_a_run_with_a_missing_adapter_is_trained_again(sweep: Path) -> None:
    script(*command(sweep, "method=rft", "sweep=gone", FEW, "logger=none"))
    [run] = [run for run in runs_of(sweep, "gone") if run.name.startswith("rft")]
    before = run.status["adapter_sha256"]
    shutil.rmtree(run.adapter)
    outcome = script(*command(sweep, "method=rft", "sweep=gone", FEW, "logger=none"))
    assert ": completed" in outcome.stdout
    assert run.status["state"] == "completed"
    assert run.status["adapter_sha256"] == before


def test_bad_input_in_a_sweep_is_a_line_of_its_table(sweep: Path) -> None:
    """Of four jobs two are refused and one meets a damaged status: told in the table, square brackets and all."""
    script(*command(sweep, "-m", "method=sft,rft", "sweep=mixed", FEW, "logger=none"))
    [damaged] = [run for run in runs_of(sweep, "mixed") if run.name.startswith("rft")]
    (damaged.folder / "status.json").write_text('{"sta')
    arguments = ("method=sft,rft", "optim.weight_decay=0.01,x", "sweep=mixed", FEW, "logger=none")
    outcome = script(*command(sweep, "-m", *arguments), check=2)
    assert "Traceback" not in outcome.stderr
    assert "optim.weight_decay" in outcome.stdout
    assert outcome.stdout.count("failed") == 3
    assert outcome.stdout.count("skipped") == 2  # in its line, and in the table
    assert "Compare the weights" not in outcome.stdout
    status = script("launch/status.py", "sweep=mixed", f"output_dir={sweep}", check=1)
    assert "damaged" in status.stdout
    bracketed = script(*command(sweep, "-m", "method=sft,rft", "rollouts.path='/no/[/x]'", "sweep=mixed"), check=2)
    assert bracketed.stderr.count("[/x]") == 1  # of both, and no table repeats it


def test_evaluate_scores_finished_runs_and_the_base_once_more(sweep: Path) -> None:
    arguments = ("benchmark=arithmetic_long", "benchmark.arithmetic_long.eval_size=20", f"output_dir={sweep}")
    outcome = script("evaluate.py", *arguments)
    assert outcome.stdout.count("%") >= 7
    files = list((sweep / "main").glob("*/eval/arithmetic_long.parquet"))
    assert len(files) == 7
    before = {file: file.stat().st_mtime_ns for file in files}
    script("evaluate.py", *arguments)
    assert {file: file.stat().st_mtime_ns for file in files} == before


def test_outcomes_with_other_settings_are_kept(sweep: Path) -> None:
    """Another number of problems, then the training command again: nothing is scored twice, and nothing is lost."""
    files = sorted((sweep / "main").glob("*/eval/arithmetic.parquet"))
    before = {file: file.read_bytes() for file in files}
    again = ["sweep=main", "benchmark=arithmetic", "benchmark.arithmetic.eval_size=10", "evaluation.max_tokens=64"]
    outcome = script("evaluate.py", *again, f"output_dir={sweep}")
    assert "arithmetic (n = 10)" in outcome.stdout
    others = sorted((sweep / "main").glob("*/eval/arithmetic-????????.parquet"))
    assert len(others) == len(files) == 7
    script(*command(sweep, "-m", METHODS))
    assert {file: file.read_bytes() for file in files} == before
    script("analyze.py", f"output_dir={sweep}", "pairs=none")
    runs = pd.read_csv(sweep / "main" / "analysis" / "runs.csv")
    runs = runs[runs["benchmark"].str.fullmatch("arithmetic(-[0-9a-f]{8})?")]
    assert sorted(runs["n"].unique()) == [10, 40]
    assert runs.loc[runs["n"] == 40, "benchmark"].eq("arithmetic").all()
    for file in others:
        remove_outcomes(file)


def test_problems_that_were_trained_on_are_counted(sweep: Path, tmp_path: Path) -> None:
    folder = next(run for run in runs_of(sweep, "main") if run.name.startswith("sft")).manifest["rollouts"]["folder"]
    rows = (
        pd.read_parquet(sweep / "rollouts" / folder / "rollouts.parquet")
        .drop_duplicates("problem_id")[["prompt", "answer"]]
        .iloc[:5]
    )
    rows.to_parquet(tmp_path / "seen.parquet")
    line = ["evaluate.py", "sweep=main", f"output_dir={sweep}", "benchmark=file", "evaluation.max_tokens=8"]
    outcome = script(*line, f"benchmark.file.eval_path={tmp_path / 'seen.parquet'}")
    assert outcome.stdout.count("trained on the prompts of 5 of 5 problems") == 6
    for file in (sweep / "main").glob("*/eval/file.parquet"):
        remove_outcomes(file)
