"""The controls of the learning-rate comparison do what they say: rows, steps, epochs, norms, points on the way."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from losslens.analysis.pipeline import analyze_job
from losslens.config.training import LearningRate, Optim
from losslens.losses.dpo import Dpo
from losslens.losses.sft import Sft
from losslens.models.adapters import adapter_fingerprint
from losslens.models.loading import LoadedModel
from losslens.rollouts.frozen import load_rollouts
from losslens.runs.run import Run, runs_of
from losslens.training.batches import filter_rollouts
from tests import conftest
from tests.conftest import OPTIM, ROOT, script, start, train_frozen


def command(output_dir: Path, *arguments: str) -> list[str]:
    """Scored on a few problems: nothing here is about how well they do."""
    return conftest.command(output_dir, "data.eval_size=8", "evaluation.max_tokens=8", *arguments)


def quiet(step: int, values: dict[str, float]) -> None:
    pass


class TestRows:
    def test_by_hand(self) -> None:
        """Prompt a: right, wrong, right. b: all right. c: wrong, wrong, right, wrong. d: all wrong."""
        rewards = {"a": [1, 0, 1], "b": [1, 1], "c": [0, 0, 1, 0], "d": [0]}
        rows = [(problem, n, reward) for problem, values in rewards.items() for n, reward in enumerate(values)]
        table = pd.DataFrame(rows, columns=["problem_id", "sample", "reward"])

        def kept(train_on: Any) -> list[tuple[str, int]]:
            return list(filter_rollouts(table, train_on)[["problem_id", "sample"]].itertuples(index=False, name=None))

        assert kept("all") == [(problem, n) for problem, n, _ in rows]
        assert kept("mixed_groups") == [("a", 0), ("a", 1), ("a", 2), ("c", 0), ("c", 1), ("c", 2), ("c", 3)]
        assert kept("paired_rollouts") == [("a", 0), ("a", 1), ("c", 0), ("c", 2)]
        assert filter_rollouts(table[table["problem_id"] == "b"], "paired_rollouts").empty

    def test_they_are_those_of_dpo(self, rollouts: pd.DataFrame) -> None:
        pairs = Dpo(name="dpo").select_pairs(rollouts)
        rows = filter_rollouts(rollouts, "paired_rollouts")
        assert list(rows.index) == sorted(row for pair in pairs for row in pair)
        assert len(Dpo(name="dpo").select_pairs(rows)) == len(pairs)  # and DPO makes the same number out of them
        everything = Dpo(name="dpo", pairs="all")
        mixed = set(filter_rollouts(rollouts, "mixed_groups").index)
        assert {row for pair in everything.select_pairs(rollouts) for row in pair} == mixed


def test_rates() -> None:
    rate = LearningRate(name="matched_low", peak=1e-3, factor=0.1)
    assert rate.of(1.0) == rate.of(0.1) == 1e-4
    assert LearningRate(name="conventional", peak=1e-3, factor=None).of(0.1) == 1e-4
    assert LearningRate(name="x", peak=3e-4, factor=0.1).of(1.0) == 3e-5  # not 3.0…04e-5


class TestSnapshots:
    def test_they_change_nothing_and_are_the_way(
        self, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
    ) -> None:
        sizes = {"max_steps": 6, "batch_size": 4}
        train_frozen(make_plan(Sft(name="sft"), **sizes), base, tokenised, tmp_path / "without", quiet)
        train_frozen(make_plan(Sft(name="sft"), **sizes, snapshot_steps=2), base, tokenised, tmp_path / "with", quiet)
        assert adapter_fingerprint(tmp_path / "with" / "adapter") == adapter_fingerprint(
            tmp_path / "without" / "adapter"
        )
        assert not (tmp_path / "without" / "snapshots").exists()
        snapshots = Run(tmp_path / "with").snapshots
        assert list(snapshots) == [2, 4, 6]
        assert all(snapshot.is_trained() for snapshot in snapshots.values())
        shas = [adapter_fingerprint(snapshot.adapter) for snapshot in snapshots.values()]
        assert len(set(shas)) == 3
        assert shas[-1] == adapter_fingerprint(tmp_path / "with" / "adapter")

    def test_a_run_that_was_killed_has_the_same_ones(
        self, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
    ) -> None:
        options = {"max_steps": 8, "batch_size": 4, "snapshot_steps": 1, "save_steps": 3, "log_steps": 1}
        plan = make_plan(Sft(name="sft"), **options)

        def cut(step: int, values: dict[str, float]) -> None:
            if step == 5:
                raise KeyboardInterrupt

        train_frozen(plan, base, tokenised, tmp_path / "whole", quiet)
        with pytest.raises(KeyboardInterrupt):
            train_frozen(plan, base, tokenised, tmp_path / "cut", cut)
        stale = tmp_path / "cut" / "snapshots" / "step-000009"  # of another attempt, which had more steps
        shutil.copytree(tmp_path / "cut" / "snapshots" / "step-000004", stale)
        train_frozen(plan, base, tokenised, tmp_path / "cut", quiet)
        whole, again = (Run(tmp_path / name).snapshots for name in ("whole", "cut"))
        assert list(whole) == list(again) == list(range(1, 9))
        for step in whole:
            assert adapter_fingerprint(again[step].adapter) == adapter_fingerprint(whole[step].adapter)


RATES = ("-m", "method=sft,dpo", "lr=conventional,matched,matched_low", "seed=0,1", "init_seed=0")


@pytest.fixture(scope="module")
def arms(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT and DPO at their rates, two orders of the data, snapshots on the way, and one run that diverges."""
    output_dir = tmp_path_factory.mktemp("arms")
    shutil.copytree(sweep / "rollouts", output_dir / "rollouts")
    outcome = script(*command(output_dir, *RATES, "sweep=arms", "optim.snapshot_steps=4", "logger=none"))
    assert outcome.stdout.count(": completed") == 8  # of 12 jobs
    assert outcome.stdout.count(": skipped") == 4
    hot = ("method=rft", "lr.peak=1e30", "optim.max_grad_norm=1e30", "optim.log_steps=1", "optim.snapshot_steps=1")
    script(*command(output_dir, *hot, "seed=0", "init_seed=0", "sweep=arms", "logger=none"), check=1)
    return output_dir


def test_one_run_has_all_names_of_its_rate(arms: Path) -> None:
    names = sorted(run.name.rpartition("-r8")[0] for run in runs_of(arms, "arms") if run.name[:3] in ("sft", "dpo"))
    expected = ("dpo-conventional", "dpo-matched", "sft-conventional", "sft-matched_low")
    assert names == sorted(name for name in expected for _ in "01")
    before = {file: file.stat().st_mtime_ns for file in (arms / "arms").rglob("*") if file.is_file()}
    again = script(*command(arms, *RATES, "sweep=arms", "optim.snapshot_steps=4", "logger=none"))
    assert again.stdout.count(": skipped") == 12
    after = {file: file.stat().st_mtime_ns for file in (arms / "arms").rglob("*") if file.is_file()}
    changed = {file.name for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    assert not changed


SCALE = ("connectivity.points=3", "connectivity.midpoint_problems=0", "probe_set.problems=12", "rotated_copies=0")


def write_tables(output_dir: Path, *arguments: str) -> None:
    """What `analyze.py` does, but for the report and the figures."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        analyze_job(compose("analyze", ["sweep=arms", f"output_dir={output_dir}", *SCALE, *arguments]))


@pytest.fixture(scope="module")
def tables(arms: Path) -> dict[str, pd.DataFrame]:
    script("analyze.py", "sweep=arms", f"output_dir={arms}", *SCALE)
    folder = arms / "arms" / "analysis"
    return {file.stem: pd.read_csv(file, keep_default_na=True) for file in folder.glob("*.csv")}


def test_the_comparison_of_a_sweep(arms: Path, tables: dict[str, pd.DataFrame]) -> None:
    arm_table = tables["arms"].set_index("arm")
    pairs = tables["pairs"]
    assert set(arm_table.index[arm_table["alias_of"].isna()]) == {
        "dpo-conventional", "dpo-matched", "rft-conventional", "sft-conventional", "sft-matched_low",
    }  # fmt: skip
    assert arm_table.loc["sft-matched", "alias_of"] == "sft-conventional"
    assert arm_table.loc["dpo-matched_low", "alias_of"] == "dpo-conventional"
    ours = pairs[pairs["run_a"].str.startswith("dpo-matched") & pairs["run_b"].str.startswith("sft-conventional")]
    other = ours[ours["run_a"].str.extract(r"-(s\d)-")[0] != ours["run_b"].str.extract(r"-(s\d)-")[0]]
    assert other["pairing"].tolist() == ["same init"] * 2
    row = arm_table.loc["dpo-matched"]
    assert row["cosine_to_sft"] == pytest.approx(other["cosine"].mean())
    assert (row["cosine_to_sft_min"], row["cosine_to_sft_max"]) == (other["cosine"].min(), other["cosine"].max())
    assert row["cka_last_to_sft"] == pytest.approx(other["cka_last"].mean())
    own = {name: tables["repeats"].set_index("arm").loc[name, "cosine"] for name in ("sft-conventional", "dpo-matched")}
    assert {name: arm_table.loc[name, "cosine_repeat"] for name in own} == pytest.approx(own)
    if min(own.values()) >= 0.2:
        assert row["cosine_to_sft_ceiling"] == pytest.approx(np.sqrt(np.prod(list(own.values()))))
    else:
        assert np.isnan(row["cosine_to_sft_ceiling"])
    assert not np.isnan(row["barrier_chord_to_sft"])


def test_a_run_that_diverged_is_in_every_table(arms: Path, tables: dict[str, pd.DataFrame]) -> None:
    runs = tables["runs"].set_index("method")
    assert str(runs.loc["rft", "diverged"]).startswith("diverged: ")
    assert np.isnan(runs.loc["rft", "norm"])
    assert runs.loc[["sft", "dpo"], "diverged"].isna().all()
    row = tables["arms"].set_index("arm").loc["rft-conventional"]
    assert (row["seeds"], row["diverged"]) == (0, 1)
    manifest = json.loads((arms / "arms" / "analysis" / "manifest.json").read_text())
    assert any(why.startswith("diverged: ") for why in manifest["left_out"].values())


def test_trajectories(arms: Path, tables: dict[str, pd.DataFrame]) -> None:
    trajectories = tables["trajectories"]
    measures = tables["runs"].drop_duplicates("run").set_index("run")
    norms = measures["norm"]
    finished = trajectories[trajectories["method"] != "rft"]
    for name, way in finished.groupby("run"):
        assert list(way["step"]) == [4, 8, 12]
        assert way["norm"].iloc[-1] == pytest.approx(norms[name])
        assert way["cosine_to_end"].iloc[-1] == pytest.approx(1)
        assert way["cosine_to_end"].iloc[0] < way["cosine_to_end"].iloc[1] < 1
        assert way["overlap_to_end"].iloc[-1] == pytest.approx(1)
        assert 0 < measures.loc[name, "locking_null"] < measures.loc[name, "locking"] < 1
        # Of the two snapshots before the end at 12, 4 is as near to 6 as 8, and comes first.
        assert measures.loc[name, "locking"] == pytest.approx(way["overlap_to_end"].iloc[0])
        assert measures.loc[name, "straightness_null"] < measures.loc[name, "straightness"] < 1
        assert way["overlap_to_repeat"].between(0, 1).all()
    pairs = tables["pairs"].set_index(["run_a", "run_b"])["cosine"]
    dpo, sft = (  # of the other seed
        next(run.name for run in runs_of(arms, "arms") if run.name.startswith(f"{start}-r8-tiny-s{seed}"))
        for start, seed in (("dpo-matched", 1), ("sft-conventional", 0))
    )
    end = trajectories[(trajectories["run"] == dpo) & (trajectories["step"] == 12)]
    assert end["cosine_to_sft"].item() == pytest.approx(pairs[dpo, sft])


def test_equal_norms(arms: Path, tables: dict[str, pd.DataFrame], capsys: pytest.CaptureFixture[str]) -> None:
    """Every run at one norm within 2%, at the point of its way that its manifest names; scored there."""
    script("analyze.py", "sweep=arms", f"output_dir={arms}", "checkpoint=norm", "pairs=none", *SCALE)
    runs = pd.read_csv(arms / "arms" / "analysis-norm" / "runs.csv")
    ends = pd.read_csv(arms / "arms" / "analysis" / "runs.csv").drop_duplicates("run").set_index("run")["norm"]
    there = runs[runs["method"].isin(["sft", "dpo"])].set_index("run")
    assert len(there) == 8
    assert there["norm"].max() / there["norm"].min() - 1 < 1e-4
    assert there["norm"].mean() == pytest.approx(ends.min(), rel=1e-5)
    assert there["accuracy"].notna().all()
    manifest = json.loads((arms / "arms" / "analysis-norm" / "manifest.json").read_text())
    assert all(point["between_steps"] for name, point in manifest["points"].items() if "between_steps" in point)
    assert "before its first snapshot" in manifest["left_out"]["what came before the first snapshot"]
    some = ends.drop(index=ends.idxmin()).dropna().mean()
    write_tables(arms, "checkpoint=norm", f"target_norm={some}", "pairs=none")
    assert "it never reaches" in capsys.readouterr().out
    chosen = pd.read_csv(arms / "arms" / f"analysis-norm-{some:g}" / "runs.csv")["norm"].dropna()
    assert 0 < len(chosen) < 8
    assert np.allclose(chosen, some, rtol=1e-5)


def test_what_died_half_way_is_made_again_and_what_is_damaged_is_told(arms: Path, tmp_path: Path) -> None:
    """A point with half a manifest is made anew; a snapshot that was cut off costs its run's trajectory only."""
    copied = shutil.copytree(arms, tmp_path / "copy")
    write_tables(copied, "checkpoint=norm", "pairs=none")
    points = sorted((copied / "arms").glob("*/snapshots/norm-*"))
    adapters = [adapter_fingerprint(point / "adapter") for point in points]
    manifest = points[0] / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    weights = points[1] / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    write_tables(copied, "checkpoint=norm", "pairs=none")
    assert [adapter_fingerprint(point / "adapter") for point in points] == adapters
    cut = next((copied / "arms").glob("dpo-matched-*/snapshots/step-000008/adapter/adapter_model.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-10])
    outcome = script("analyze.py", "sweep=arms", f"output_dir={copied}", "pairs=none", *SCALE)
    assert f"left out: trajectory of {cut.parents[3].name}: " in outcome.stdout
    trajectories = pd.read_csv(copied / "arms" / "analysis" / "trajectories.csv")
    assert trajectories["run"].nunique() == 8  # of eight finished ones and one that diverged
    assert cut.parents[3].name not in set(trajectories["run"])


def test_a_step_on_the_way(arms: Path, tables: dict[str, pd.DataFrame]) -> None:
    script("analyze.py", "sweep=arms", f"output_dir={arms}", "checkpoint=8", "pairs=none", *SCALE)
    runs = pd.read_csv(arms / "arms" / "analysis-step-8" / "runs.csv").drop_duplicates("run").set_index("run")
    way = pd.read_csv(arms / "arms" / "analysis" / "trajectories.csv")
    at_8 = way[(way["step"] == 8) & (way["method"] != "rft")].set_index("run")["norm"]
    assert runs.loc[at_8.index, "norm"].to_dict() == pytest.approx(at_8.to_dict())
    wrong = script("analyze.py", "sweep=arms", f"output_dir={arms}", "checkpoint=7", check=2)
    assert "checkpoint=7: no run has a snapshot there" in wrong.stderr
    wrong = script("analyze.py", "sweep=arms", f"output_dir={arms}", "target_norm=1", check=2)
    assert wrong.stderr == "analyze.py: target_norm=1 requires checkpoint=norm\n"


def test_rows_and_epochs_of_a_sweep(arms: Path) -> None:
    """Row-matched: both methods on DPO's rows. Epoch-matched: as many passes over own rows, whatever their number."""
    options = ("-m", "method=sft,dpo", "train_on=paired_rollouts", "optim.epochs=1.5", "sweep=rows", "logger=none")
    script(*command(arms, *options))
    runs = {run.manifest["method"]: run for run in runs_of(arms, "rows")}
    table = load_rollouts(arms / "rollouts" / runs["sft"].manifest["rollouts"]["folder"]).table
    pairs = len(Dpo(name="dpo").select_pairs(table))
    assert runs["sft"].manifest["trained_on"]["rollouts"] == 2 * pairs
    assert runs["sft"].manifest["trained_on"]["pass_rate"] == 0.5
    for method, rows in (("sft", 2 * pairs), ("dpo", pairs)):
        training = runs[method].manifest["training"]
        assert training["rows"] == rows
        assert training["steps"] == runs[method].status["step"] == math.ceil(1.5 * rows / 4)
        assert 1.5 <= training["epochs"] < 1.5 + 4 / rows
    # One pair a prompt is made of the same rows in any case: for DPO this is one run. With all pairs it is not.
    script(*command(arms, "-m", "method=dpo", "train_on=all,mixed_groups,paired_rollouts", "sweep=once", "logger=none"))
    assert sum(run.name.startswith("dpo") for run in runs_of(arms, "once")) == 1
    everything = ("method.pairs=all", "train_on=all,mixed_groups,paired_rollouts", "sweep=twice", "logger=none")
    script(*command(arms, "-m", "method=dpo", *everything))
    assert sum(run.name.startswith("dpo") for run in runs_of(arms, "twice")) == 2


def test_other_rollouts_side_by_side(arms: Path) -> None:
    """The share of right rollouts as an axis: refused unless it is asked for."""
    student = ("-m", "method=sft,dpo", "rollouts.policy=base", "seed=0", "init_seed=0", "sweep=student", "logger=none")
    script(*command(arms, *student))
    line = ("analyze.py", "sweep=[arms,student]", f"output_dir={arms}", "pairs=none", *SCALE)
    refused = script(*line, check=2)
    assert "different rollouts" in refused.stderr
    assert "allow_different=rollouts" in refused.stderr
    script(*line, "allow_different=rollouts")
    arm_table = pd.read_csv(arms / "arms" / "analysis" / "arms.csv")
    dpo = arm_table[(arm_table["method"] == "dpo") & (arm_table["lr"] == "conventional")]
    assert dpo["pass_rate"].nunique() == 2
    assert dpo["settings"].str.contains("rollouts.sampling.policy=base").sum() == 1
    assert dpo["cosine_to_sft"].notna().all()  # each is held against SFT on its own rollouts


def test_two_processes_that_begin_one_run_by_two_names(arms: Path) -> None:
    """One of them trains, the other waits and finds it done."""
    options = ("method=sft", "seed=9", "sweep=race", "logger=none")
    first, second = (start(*command(arms, *options, f"lr={lr}")) for lr in ("conventional", "matched"))
    with first, second:
        assert [process.wait() for process in (first, second)] == [0, 0]
        said = first.stdout + second.stdout
    assert (said.count(": completed"), said.count(": skipped")) == (1, 1)
    assert sum(run.name.startswith("sft") for run in runs_of(arms, "race")) == 1


def test_epochs_that_make_whole_steps() -> None:
    """1.1 passes over 100 rows in batches of 10 are 11 steps, though 1.1·100 is 110.00000000000001."""
    optim = Optim(**{**OPTIM, "epochs": 1.1, "batch_size": 10, "micro_batch": 10})
    assert [optim.steps(100), optim.steps(101), optim.steps(95)] == [11, 12, 11]
    assert Optim(**{**OPTIM, "max_steps": 7}).steps(100) == 7
