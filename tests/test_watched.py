"""Long work is watched: a run that diverges, hangs, has died, or will not fit on the disk ends with its reason."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from losslens.config.overrides import number_of_jobs
from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.core.errors import DivergedError, InputError
from losslens.core.files import read_json, write_json
from losslens.losses.sft import Sft
from losslens.models.adapters import LoraSettings
from losslens.models.full_model import train_all_weights
from losslens.models.loading import LoadedModel, preserved
from losslens.models.trained_weights import base_norm, update_norm
from losslens.pipeline import disk_space
from losslens.runs.run import Run
from losslens.runs.spec import RunSpec
from losslens.scheduling.status import refresh_run_statuses
from losslens.training.guards import ExplosionGuard, StallGuard
from losslens.training.run import train_run
from losslens.training.source import FrozenSource
from tests.conftest import ROOT, frozen_source
from tests.test_trainers import trainer_of


class TestStatus:
    """A status that says `running`."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Run:
        run = Run(tmp_path / "main" / "sft-conventional-r8-tiny-s42-12345678")
        run.folder.mkdir(parents=True)
        run.set_state("running", step=5, max_steps=9, loss=1.0)
        return run

    def test_nobody_runs_it(self, run: Run) -> None:
        [found] = refresh_run_statuses([run])
        assert found.state == "failed"
        assert found.is_over
        assert found.status["error"] == (
            f"process {os.getpid()} on {os.uname().nodename} was killed; the same command resumes"
        )
        assert run.status["state"] == "failed"
        assert run.status["step"] == 5

    def test_somebody_runs_it(self, run: Run) -> None:
        with FileLock(run.lock_file):
            [found] = refresh_run_statuses([run])
        assert (found.state, found.status.get("error")) == ("running", None)
        assert run.status["state"] == "running"

    def test_it_ended_while_it_was_asked(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        lock = Run.lock

        def late(self: Run, wait: bool = True) -> Any:
            run.set_state("completed", step=9, max_steps=9)
            return lock(self, wait)

        monkeypatch.setattr(Run, "lock", late)
        assert refresh_run_statuses([run])[0].state == "completed"

    @pytest.mark.parametrize("minutes", [1, 60])
    def test_another_host_is_only_asked_for_its_last_message(self, run: Run, minutes: int) -> None:
        written = (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat(timespec="seconds")
        process = {"host": "elsewhere", "pid": 7}
        write_json(run.folder / "status.json", {**run.status, "process": process, "time": written})
        [found] = refresh_run_statuses([run])
        assert found.state == run.status["state"] == "running"
        late = f"process 7 on elsewhere: no message since {written}"
        assert found.status.get("error") == (late if minutes == 60 else None)


class TestNorms:
    """The norms that tell an explosion."""

    def test_of_an_adapter(self, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path) -> None:
        with trainer_of(make_plan(Sft(name="sft"), 1e-2, max_steps=2), base, tokenised, tmp_path) as trainer:
            assert update_norm(trainer.model) == 0
            trainer.train()
            modules = [module for module in trainer.model.modules() if hasattr(module, "get_delta_weight")]
            dense = torch.cat([module.get_delta_weight("default").flatten() for module in modules])
            weights = torch.cat([module.get_base_layer().weight.flatten() for module in modules])
            assert update_norm(trainer.model) == pytest.approx(dense.norm().item(), rel=1e-5)
            assert base_norm(trainer.model) == pytest.approx(weights.norm().item(), rel=1e-5)

    def test_of_all_weights(self, base: LoadedModel) -> None:
        with preserved(base.model):
            train_all_weights(base.model)
            before = base_norm(base.model)
            q = base.model.model.layers[0].self_attn.q_proj.weight
            with torch.no_grad():
                q[0, 0] += 3
                q[1, 0] += 4
            assert update_norm(base.model) == pytest.approx(5, rel=1e-5)
            assert base_norm(base.model) == before

    def test_an_update_of_ten_times_the_base_is_the_end(
        self, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
    ) -> None:
        plan = make_plan(Sft(name="sft"), 1e5, max_steps=10, log_steps=1, save_steps=1, warmup_ratio=0)
        with pytest.raises(
            DivergedError, match=r"diverged: the norm of the update, .*, is \S+ times that of the base's"
        ):
            train_run(plan, base, frozen_source(plan, tokenised), tmp_path, lambda step, values: None)

    def test_one_below_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        guard, state = ExplosionGuard(), SimpleNamespace(global_step=3)
        monkeypatch.setattr("losslens.training.guards.base_norm", lambda _: 2.0)
        guard.on_train_begin(None, None, None, model=None)  # type: ignore[arg-type]
        for norm in (0.0, 20.0, float("nan")):  # what is not finite is NonFiniteGuard's
            monkeypatch.setattr("losslens.training.guards.update_norm", lambda _, norm=norm: norm)
            guard.on_log(None, state, None, model=None)  # type: ignore[arg-type]
        monkeypatch.setattr("losslens.training.guards.update_norm", lambda _: 20.1)
        with pytest.raises(DivergedError, match="at step 3"):
            guard.on_log(None, state, None, model=None)  # type: ignore[arg-type]


class Hanging(FrozenSource):
    """Rollouts of which those of the second step never come."""

    def batch(self, step: int, policy: Any) -> Any:
        if step == 1:
            time.sleep(60)
        return super().batch(step, policy)


class TestStalls:
    """A step that does not end."""

    def test_a_source_that_never_answers(
        self, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
    ) -> None:
        plan = make_plan(Sft(name="sft"), 1e-2, max_steps=3, max_step_minutes=3 / 60)
        before = signal.getsignal(signal.SIGALRM)
        source = Hanging(tokenised, plan.method, plan.optim, plan.seed)
        with pytest.raises(TimeoutError, match=r"step 2 has taken more than 0\.05 minutes \(optim\.max_step_minutes\)"):
            train_run(plan, base, source, tmp_path, lambda step, values: None)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        assert signal.getsignal(signal.SIGALRM) == before
        assert not (tmp_path / "error.txt").exists()

    def test_one_that_no_signal_reaches(self, tmp_path: Path) -> None:
        lines = (
            "import signal, threading, time, sys; from pathlib import Path; from types import SimpleNamespace",
            "from losslens.training import guards; guards._GRACE = 0.1",
            "guard = guards.StallGuard(0.005, Path(sys.argv[1]))",
            "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])",
            "guard.on_train_begin(None, SimpleNamespace(global_step=0), None)",
            "time.sleep(60)",
        )
        file = tmp_path / "error.txt"
        outcome = subprocess.run([sys.executable, "-c", "\n".join(lines), str(file)], cwd=ROOT, check=False)
        assert outcome.returncode == 1
        assert "Timeout (0:00:00" in file.read_text()
        assert 'File "<string>", line 6' in file.read_text()

    def test_nothing_is_written_through_a_link(self, tmp_path: Path) -> None:
        elsewhere, link = tmp_path / "elsewhere", tmp_path / "error.txt"
        elsewhere.write_text("kept")
        link.symlink_to(elsewhere)
        guard = StallGuard(5.0, link)
        guard.on_train_begin(None, SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
        guard.close()
        assert elsewhere.read_text() == "kept"

    @pytest.mark.parametrize("minutes", [None, 5.0])
    def test_what_ends_in_time_leaves_nothing(self, minutes: float | None, tmp_path: Path) -> None:
        guard = StallGuard(minutes, tmp_path / "error.txt")
        guard.on_train_begin(None, SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
        guard.on_step_end(None, SimpleNamespace(global_step=1), None)  # type: ignore[arg-type]
        assert (signal.getitimer(signal.ITIMER_REAL)[0] > 290) == (minutes is not None)
        guard.close()
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        assert not list(tmp_path.iterdir())


class TestDiskSpace:
    """What a sweep will need."""

    @pytest.fixture
    def spec(self, tmp_path: Path) -> RunSpec:
        return self.of(f"output_dir={tmp_path / 'outputs'}")

    def of(self, *overrides: str) -> RunSpec:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return RunSpec.of(parse(TrainConfig, compose("train", list(overrides))))

    def test_by_hand(self, spec: RunSpec) -> None:
        student = read_json(ROOT / "src/losslens/tiny/student/config.json")
        hidden, layers = student["hidden_size"], student["num_hidden_layers"]
        heads, keys = (student["head_dim"] * student[n] for n in ("num_attention_heads", "num_key_value_heads"))
        # q and o: hidden and heads; k and v: hidden and keys.
        weights = 8 * layers * 2 * ((hidden + heads) + (hidden + keys))
        need = disk_space.disk_need(spec)
        assert need.kept == 4 * weights + 2000 * 500
        assert (
            need.temporary == 3 * 4 * 4 * weights
        )  # three checkpoints of weights, two moments, the weights logged last
        more = disk_space.disk_need(self.of("optim.snapshot_steps=20", "data.eval_size=0"))
        assert more.kept == 4 * weights * (1 + 100 // 20)

    def test_all_weights(self, base: LoadedModel) -> None:
        full = disk_space.disk_need(self.of("adapter=none", "data.eval_size=0"))
        weights = sum(weight.numel() for weight in base.model.parameters())
        assert (full.kept, full.temporary) == (4 * weights, 3 * 3 * 4 * weights)

    def test_it_is_told(self, spec: RunSpec, capsys: pytest.CaptureFixture[str]) -> None:
        disk_space.require_space(spec, jobs=6, at_once=2)
        need = disk_space.disk_need(spec)
        kept, temporary = 6 * need.kept / 1e6, 2 * need.temporary / 1e6
        told = f"disk for 6 runs: {kept:.1f} MB, and up to {temporary:.1f} MB for checkpoints\n"
        assert capsys.readouterr().out == told

    def test_too_little_is_refused_before_anything_is_written(
        self, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        need = disk_space.disk_need(spec)
        usage = lambda free: lambda _: SimpleNamespace(free=free)  # noqa: E731
        monkeypatch.setattr(shutil, "disk_usage", usage(6 * need.kept + need.temporary - 1))
        with pytest.raises(InputError, match=r"output_dir=.*: 8\.6 MB are free, but 6 runs may need 8\.6 MB"):
            disk_space.require_space(spec, jobs=6)
        monkeypatch.setattr(shutil, "disk_usage", usage(6 * need.kept + need.temporary))
        disk_space.require_space(spec, jobs=6)
        # Two runs are there already.
        for name in ("sft", "dft"):
            (spec.sweep / name / "adapter").mkdir(parents=True)
        monkeypatch.setattr(shutil, "disk_usage", usage(4 * need.kept + need.temporary))
        disk_space.require_space(spec, jobs=6)

    @pytest.mark.parametrize(
        ("arguments", "jobs"),
        [
            (["-m", "method=sft,dpo", "seed=range(0,3)", "data.name=x"], 6),
            (["experiment=lr_matched_dpo"], None),
            (["-m", "seed=1,2", "method=sft", "rollouts.accept=[mostly_cut]"], 2),
            (["method=sft"], 1),
        ],
    )
    def test_the_number_of_jobs(
        self, arguments: list[str], jobs: int | None, hydra: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        plain = [line for line in arguments if "," not in line and line != "-m"]
        mode = ["hydra.mode=MULTIRUN"] if "-m" in arguments or jobs is None else ["hydra.mode=RUN"]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train", [*plain, *mode], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        if jobs is None:
            jobs = 1
            for values in HydraConfig.get().sweeper.params.values():
                jobs *= len(str(values).split(","))
            assert jobs > 1
        assert number_of_jobs() == jobs

    @pytest.fixture
    def hydra(self) -> Iterator[None]:
        before = HydraConfig.instance().cfg
        yield
        HydraConfig.instance().cfg = before


def test_lora_settings_decide_the_size() -> None:
    from losslens.models.trained_weights import require_tunable
    from tests.conftest import base_source

    sizes = [require_tunable(base_source(), LoraSettings(r, 4.0, 0.0, ("q_proj",))) for r in (2, 4)]
    assert sizes[1] == 2 * sizes[0] > 0
