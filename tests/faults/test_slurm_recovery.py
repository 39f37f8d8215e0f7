"""Faults of submissions to Slurm, and of what Slurm says, against a Slurm in this process that can be told to lie."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import filelock._unix
import pytest
import submitit
from filelock import SoftFileLease
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from losslens.cli import status as status_command
from losslens.core import provenance
from losslens.core.errors import InputError
from losslens.core.files import read_json, write_json
from losslens.core.preemption import Preempted
from losslens.pipeline import sweep as sweep_module
from losslens.runs.run import Run
from losslens.scheduling import status
from losslens.scheduling.record import SubmissionRecord, read_record, record_file, write_record
from losslens.scheduling.slurm import cluster, intent, submit, task
from losslens.scheduling.slurm.launch import launch
from losslens.scheduling.status import NOT_REQUEUED, refresh_run_statuses
from tests.conftest import ROOT
from tests.faults.ledger import record

NO_CONTACT = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
TOO_MANY = (
    "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS "
    "policy (job submit limit, user's size and/or time limits)"
)
COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scontrol", "scancel")


@dataclass(frozen=True)
class Job:
    """A job that the controller has accepted."""

    id: str
    comment: str
    command: str
    state: str = "PENDING"
    reason: str = "Priority"
    end: str = "N/A"


class Slurm:
    """Slurm's commands, without processes. What it has accepted lies in a file, since submitting processes are killed.

    Args:
        file: The file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.point: Callable[[], None] = lambda: None  # called before and after each command takes effect
        self.config = "ClusterName             = fake\nMaxArraySize            = 1001\n"
        self.accounts: str | None = None  # what sacct prints; None without accounting
        self.sbatch: dict[int, tuple[bool, str, str]] = {}  # by number of the call: accepted, answer, error
        self.calls = 0
        self.deaf: set[str] = set()  # commands that fail
        self.slow: set[str] = set()  # commands that do not end in time

    @property
    def jobs(self) -> list[Job]:
        return [Job(**job) for job in read_json(self.file)] if self.file.exists() else []

    def set(self, jobs: list[Job]) -> None:
        write_json(self.file, [vars(job) for job in jobs])

    def change(self, change: Callable[[Job], Job | None]) -> None:
        """Replaces each job by what `change` makes of it; None: the controller has forgotten it."""
        self.set([changed for job in self.jobs if (changed := change(job)) is not None])

    def run(self, command: list[str], text: str = "") -> tuple[int, str, str]:
        self.point()
        name, *arguments = command
        if name in self.slow:
            raise subprocess.TimeoutExpired(command, 30)
        outcome = (1, "", f"{name}: error") if name in self.deaf else getattr(self, f"_{name}")(arguments)
        self.point()
        return outcome

    def _sbatch(self, arguments: list[str]) -> tuple[int, str, str]:
        if arguments[0] == "--test-only":
            return 0, "", ""
        self.calls += 1
        number = 101 + len({job.id.partition("_")[0] for job in self.jobs})
        accepted, answer, error = self.sbatch.get(self.calls, (True, f"Submitted batch job {number}", ""))
        if accepted:
            text = Path(arguments[0]).read_text(encoding="utf-8")
            comment = re.search(r"^#SBATCH --comment=(\S+)", text, re.MULTILINE)[1]  # type: ignore[index]
            last = re.search(r"^#SBATCH --array=0-(\d+)", text, re.MULTILINE)
            ids = [f"{number}_{task}" for task in range(int(last[1]) + 1)] if last else [str(number)]
            self.set([*self.jobs, *(Job(job, comment, arguments[0]) for job in ids)])
        return (1 if error else 0), answer, error

    def _squeue(self, arguments: list[str]) -> tuple[int, str, str]:
        pattern = next(argument for argument in arguments if argument.startswith("--format=")).partition("=")[2]
        names = {"i": "id", "T": "state", "r": "reason", "e": "end", "o": "command", "k": "comment"}
        fields = [names[field.removeprefix("%")] for field in pattern.split("|")]
        return 0, "\n".join("|".join(getattr(job, field) for field in fields) for job in self.jobs), ""

    def _sacct(self, _: list[str]) -> tuple[int, str, str]:
        return (1, "", "Slurm accounting storage is disabled") if self.accounts is None else (0, self.accounts, "")

    def _scontrol(self, _: list[str]) -> tuple[int, str, str]:
        return 0, self.config, ""

    def _scancel(self, arguments: list[str]) -> tuple[int, str, str]:
        cancelled = [replace(j, state="CANCELLED") if j.id.partition("_")[0] == arguments[0] else j for j in self.jobs]
        self.set(cancelled)
        return 0, "", ""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """A Slurm of its own, whose answers never lag: what it does not know is dead."""
    fake = Slurm(tmp_path / "controller.json")
    real_run, real_which = subprocess.run, shutil.which

    def run(command: Any, *given: Any, **options: Any) -> Any:
        if command[0] not in COMMANDS:
            return real_run(command, *given, **options)
        return subprocess.CompletedProcess(command, *fake.run(list(command), options.get("input", "")))

    def call(function: Any) -> str:
        code, answer, error = fake.run([function.command[0], *function.command[1:]])
        if code:
            raise submitit.core.utils.FailedJobError(error)
        return answer

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name, *given: name if name in COMMANDS else real_which(name, *given))
    monkeypatch.setattr(submitit.core.utils.CommandFunction, "__call__", call)
    monkeypatch.setattr(submit, "snapshot_code", lambda script, folder: folder / "code-0")
    monkeypatch.setattr(intent, "_SBATCH_SECONDS", 0.0)
    monkeypatch.setattr(status, "_LAG_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    cluster._known.clear()
    yield fake
    cluster._known.clear()


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", ["resources=cpu"])


@pytest.fixture
def send(composed: DictConfig, tmp_path: Path, slurm: Slurm) -> Callable[..., None]:
    """Gives the same command each time: two runs, and the rollouts that they need."""

    def submit_runs(runs: int = 2, folder: Path = tmp_path / "outputs", **changes: object) -> None:
        slurm.calls = 0
        configs = []
        for seed in range(runs):
            config = composed.copy()
            with open_dict(config):
                config.merge_with({"output_dir": str(folder), "seed": seed, **changes})
            configs.append(config)
        launch(ROOT / "train.py", configs, wait=False, dry_run=False)

    return submit_runs


def the_runs(tmp_path: Path) -> list[Run]:
    return [Run(file.parent) for file in sorted((tmp_path / "outputs" / "main").glob("*-s*/status.json"))]


def records(tmp_path: Path) -> list[SubmissionRecord]:
    return [found for run in the_runs(tmp_path) if (found := read_record(record_file(run.folder)))]


def allowed(slurm: Slurm) -> list[str]:
    """Ids of the jobs that would do something: those whose submission was not abandoned."""
    folders = {job.id: Path(job.command).parent for job in slurm.jobs}
    return [
        job.id
        for job in slurm.jobs
        if (folders[job.id] / f"submission-{job.comment.partition(':')[2]}.json").exists() and job.state == "PENDING"
    ]


def leftovers(tmp_path: Path) -> list[Path]:
    left = re.compile(r"[0-9a-f]{32}\.pkl|.*\.tmp|\.slurm\.lease")
    found = [file for file in (tmp_path / "outputs").rglob("*") if left.fullmatch(file.name)]
    scripts = [file for file in (tmp_path / "outputs").rglob(".submission_file_*") if not file.is_symlink()]
    return [*found, *scripts, *(tmp_path / "outputs").rglob("submission-*/")]


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.symlink", "os.link"}


def killed(slurm: Slurm, act: Callable[[], None], root: Path, at: int) -> int:
    """Kills a process at its `at`-th command, or change of a file below `root`; returns the number of these."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        passed = 0

        def point() -> None:
            nonlocal passed
            passed += 1
            if passed == at:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            changes = event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if changes and str(arguments[0]).startswith(str(root)):
                point()

        try:
            slurm.point = point
            sys.addaudithook(hook)
            act()
            os.write(write, str(passed).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        counted = answer.read()
    ended = os.waitpid(child, 0)[1]
    assert (os.WTERMSIG(ended) == signal.SIGKILL) == bool(at)
    return int(counted or 0)


def test_killed_at_every_operation_it_submits_once(slurm: Slurm, send: Callable[..., None], tmp_path: Path) -> None:
    """At each file operation and each command of Slurm, from the plan to the last record."""
    outputs = tmp_path / "outputs"
    total = killed(slurm, send, outputs, at=0)
    assert total > 60
    for at in range(1, total + 1):
        shutil.rmtree(outputs)
        slurm.file.unlink(missing_ok=True)
        cluster._known.clear()
        killed(slurm, send, outputs, at)
        send()
        detail = f"{slurm.jobs}\n{records(tmp_path)}\n{leftovers(tmp_path)}"
        once = sorted(job.id for job in slurm.jobs) == ["101", "102_0", "102_1"] == sorted(allowed(slurm))
        named = [found.job for found in sorted(records(tmp_path), key=lambda found: found.job)] == ["102_0", "102_1"]
        outcome = "left over" if leftovers(tmp_path) else "same bytes" if once and named else "different result"
        record("SIGKILL during a submission to Slurm", f"2 runs and rollouts, operation {at}", outcome, detail)
    send()
    assert len(slurm.jobs) == 3


@pytest.mark.parametrize(
    ("state", "reason", "then", "error"),
    [
        ("PREEMPTED", "None", "preempted", NOT_REQUEUED),
        ("CANCELLED", "None", "failed", "Slurm job 102_0: cancelled (scancel)"),
        ("TIMEOUT", "TimeLimit", "failed", "Slurm job 102_0: killed at its time limit before it could stop"),
        ("NODE_FAIL", "NodeDown", "failed", "Slurm job 102_0: its node failed"),
        ("OUT_OF_MEMORY", "OutOfMemory", "failed", "Slurm job 102_0: out of memory (resources.memory_gb)"),
        ("FAILED", "JobLaunchFailure", "failed", "Slurm job 102_0: its job ended as FAILED (JobLaunchFailure)"),
        ("BOOT_FAIL", "None", "failed", "Slurm job 102_0: its job ended as BOOT_FAIL"),
    ],
)
@pytest.mark.parametrize("reached", ["queued", "running", "preempted"])
def test_each_end_is_told_in_the_words_of_slurm_and_submitted_again(
    state: str, reason: str, then: str, error: str, reached: str, slurm: Slurm, send: Any, tmp_path: Path
) -> None:
    send()
    run = next(run for run in the_runs(tmp_path) if read_json(record_file(run.folder))["job"] == "102_0")
    if reached != "queued":
        run.set_state(reached, slurm={"job": "102_0", "cluster": "fake"}, step=4, max_steps=9)  # type: ignore[arg-type]
    slurm.change(lambda job: replace(job, state=state, reason=reason) if job.id == "102_0" else job)
    for _ in range(2):  # and once more, from what is on disk now
        (told,) = [each for each in refresh_run_statuses(the_runs(tmp_path)) if each.run == run]
        assert (told.state, told.is_over, told.slurm.name) == (then, True, state)  # type: ignore[union-attr]
        assert told.status["error"].startswith(error)
        assert run.status.get("step") == (None if reached == "queued" else 4)
    send()
    again = {job.id for job in slurm.jobs} - {"101", "102_0", "102_1"}
    outcome = "same bytes" if again == {"103"} and run.status["state"] == "queued" else "different result"
    record("Slurm ends a job", f"{state} of a run that is {reached}", outcome, str(again))


@pytest.mark.parametrize(
    ("shown", "why"),
    [
        ("JobState=RUNNING Restarts=0 StartTime=2026-01-01T10:00:00 PreemptTime=2026-01-01T10:05:00", "preempted"),
        ("JobState=PENDING Restarts=1 StartTime=2026-01-01T10:00:00 PreemptTime=2026-01-01T10:05:00", "requeued"),
        # PreemptMode=CANCEL, seen on Slurm 22.05: COMPLETING, as after scancel.
        ("JobState=COMPLETING Restarts=0 StartTime=2026-01-01T10:00:00 PreemptTime=2026-01-01T10:05:00", "evicted"),
        ("JobState=COMPLETING Restarts=0 StartTime=2026-01-01T10:00:00 PreemptTime=None", "cancelled"),
        # Preempted and requeued before, and now cancelled.
        ("JobState=COMPLETING Restarts=0 StartTime=2026-01-01T11:00:00 PreemptTime=2026-01-01T10:05:00", "cancelled"),
        ("", "cancelled"),
    ],
)
def test_why_a_job_is_told_to_stop(shown: str, why: str, slurm: Slurm) -> None:
    slurm.config = f"JobId=12 {shown}"
    assert cluster.why_stopped("12", 0) == why
    slurm.deaf.add("scontrol")
    assert cluster.why_stopped("12", 0) == "preempted"


def accounts(*rows: str) -> str:
    return "\n".join(["JobID|State|ExitCode|End|Comment", *rows])


def now(**ago: float) -> str:
    return (datetime.now() - timedelta(**ago)).isoformat(timespec="seconds")  # as Slurm prints it


@pytest.mark.parametrize("reached", ["queued", "running"])
def test_a_job_that_slurm_does_not_know_yet_or_any_more_is_left_alone_for_a_while(
    reached: str, slurm: Slurm, send: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    send(runs=1)
    (run,) = the_runs(tmp_path)
    jobs = slurm.jobs
    if reached == "running":
        run.set_state("running", slurm={"job": "102", "cluster": "fake"})
    slurm.change(lambda job: None if job.id == "102" else job)
    monkeypatch.setattr(status, "_LAG_SECONDS", 60.0)
    capsys.readouterr()
    send(runs=1)
    assert "skipped: Slurm does not know its job 102 yet; repeat the command soon" in capsys.readouterr().out
    (told,) = refresh_run_statuses([run])
    kept = (told.state, told.is_over, len(slurm.jobs)) == (reached, False, 1)
    record(
        "accounting lags", f"a {reached} job is in neither squeue nor sacct", "same bytes" if kept else "wrong status"
    )
    slurm.set(jobs)  # it appears: nothing was lost
    assert [each.state for each in refresh_run_statuses([run])] == [reached]
    send(runs=1)
    assert len(slurm.jobs) == 2
    # The rollouts: a job that waits for others cannot be submitted before Slurm knows those.
    slurm.set([])
    with pytest.raises(InputError, match=r"rollouts .*: Slurm does not know its job 101 yet; repeat the command soon$"):
        send()
    assert not slurm.jobs
    record("accounting lags", "the rollouts' job is unknown", "clear line")
    # A minute later it is dead.
    monkeypatch.setattr(status, "_LAG_SECONDS", 0.0)
    (told,) = refresh_run_statuses([run])
    assert told.state == "failed"
    assert "Slurm no longer knows its job 102" in told.status["error"]


def test_a_run_that_a_process_has_locked_is_never_marked_as_failed(slurm: Slurm, send: Any, tmp_path: Path) -> None:
    send(runs=1)
    (run,) = the_runs(tmp_path)
    run.set_state("running", slurm={"job": "102", "cluster": "fake"})
    for jobs in ([], [replace(job, state="FAILED") for job in slurm.jobs]):
        slurm.set(jobs)
        with run.lock():
            (told,) = refresh_run_statuses([run])
            assert told.state == run.status["state"] == "running"
            record("Slurm lies", f"a living job is {'FAILED' if jobs else 'unknown'}", "same bytes")
    assert [each.state for each in refresh_run_statuses([run])] == ["failed"]


@pytest.mark.parametrize(
    ("told", "state"),
    [
        (None, "failed"),  # accounting_storage/none
        (accounts(), "failed"),  # not in it yet
        (accounts("102|RUNNING|0:0|Unknown|"), "failed"),  # its end was never accounted
        (accounts("102|COMPLETED|0:0|{now}|"), "running"),  # the run's last word is still on its way
        (accounts("102|COMPLETED|0:0|{earlier}|"), "failed"),
        (accounts("102|PREEMPTED|0:0|{now}|"), "preempted"),
        (accounts("102|CANCELLED by 0|0:0|{now}|"), "failed"),
    ],
)
def test_what_the_accounts_say_of_a_job_that_has_left_the_queue(
    told: str | None, state: str, slurm: Slurm, send: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(runs=1)
    (run,) = the_runs(tmp_path)
    run.set_state("running", slurm={"job": "102", "cluster": "fake"})
    slurm.change(lambda job: None if job.id == "102" else job)
    slurm.accounts = None if told is None else told.format(now=now(), earlier=now(hours=1))
    if state == "running":
        monkeypatch.setattr(status, "_LAG_SECONDS", 60.0)
    (seen,) = refresh_run_statuses([run])
    outcome = "clear line" if seen.state == state and (state == "running" or seen.status["error"]) else "wrong status"
    record("accounting lies", f"sacct prints {told!r}", outcome, str(seen))
    if told and "earlier" in told:
        assert seen.status["error"].startswith("Slurm job 102: it is COMPLETED, and its run is not")


def test_a_job_id_that_another_job_has_now_is_not_ours(slurm: Slurm, send: Any, tmp_path: Path) -> None:
    """The cluster was installed anew, under the same name, and counts from 1."""
    send(runs=1)
    (run,) = the_runs(tmp_path)
    ours = slurm.jobs[-1]
    for fault, other in {
        "a stranger's job": replace(ours, comment="(null)", command="/home/other/job.sh"),
        "a job of another submission": replace(ours, comment="losslens:0123456789abcdef"),
    }.items():
        slurm.set([slurm.jobs[0], replace(other, state="RUNNING")])
        assert [(each.state, each.slurm) for each in refresh_run_statuses([run])] == [("failed", None)]
        send(runs=1)  # the fake counts on from the jobs it has
        again = slurm.jobs[-1]
        kept = again.id == "103" and read_json(record_file(run.folder))["job"] == "103"
        record("a job id is used again", fault, "same bytes" if kept else "different result", str(slurm.jobs))
        # Back to where it was.
        found = read_record(record_file(run.folder))
        assert found is not None
        write_record(record_file(run.folder), replace(found, job="102", submission=ours.comment.partition(":")[2]))
        run.set_state("queued")
    # A site that replaces comments does not lose its jobs; nor does a record of an earlier version.
    for comment, submission in (("by the site", ours.comment.partition(":")[2]), (ours.comment, "")):
        write_record(record_file(run.folder), replace(found, job="102", submission=submission))
        slurm.set([slurm.jobs[0], replace(ours, comment=comment, state="RUNNING")])
        (told,) = refresh_run_statuses([run])
        assert told.is_live
    old = read_json(record_file(run.folder))
    del old["submission"]
    write_json(record_file(run.folder), old)
    assert refresh_run_statuses([run])[0].is_live


@pytest.mark.parametrize("how", ["deaf", "slow"])
def test_a_queue_that_cannot_be_queried_changes_nothing(how: str, slurm: Slurm, send: Any, tmp_path: Path) -> None:
    send()
    before = {file: file.read_bytes() for file in (tmp_path / "outputs").rglob("*.json")}
    getattr(slurm, how).add("squeue")
    with pytest.raises(InputError, match="the Slurm queue cannot be queried"):
        send()
    told = refresh_run_statuses(the_runs(tmp_path))
    kept = {file: file.read_bytes() for file in (tmp_path / "outputs").rglob("*.json")} == before
    assert {(each.state, each.is_over) for each in told} == {("queued", False)}
    assert len(slurm.jobs) == 3
    record("squeue fails", how, "clear line" if kept else "different result")


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("answer", [NO_CONTACT, "sbatch: error: Socket timed out on send/recv operation", ""])
def test_an_sbatch_without_an_answer_is_found_out_about(
    answer: str, call: int, accepted: bool, slurm: Slurm, send: Any, tmp_path: Path, capsys: Any
) -> None:
    """The controller has the jobs, or it does not; without an error, sbatch prints what nobody understands."""
    slurm.sbatch[call] = (accepted, "" if answer else "Subm", answer)
    fault = f"{answer or 'half an answer'}, call {call}, {'accepted' if accepted else 'not accepted'}"
    if accepted:
        send()
        once = sorted(job.id for job in slurm.jobs) == sorted(allowed(slurm)) == ["101", "102_0", "102_1"]
        record("sbatch does not hear the answer", fault, "same bytes" if once else "different result", str(slurm.jobs))
        assert {found.job for found in records(tmp_path)} == {"102_0", "102_1"}
        assert len(list((tmp_path / "outputs" / "main" / "slurm").glob("102_*_submitted.pkl"))) == 2
    else:
        with pytest.raises(InputError, match=r"^Slurm does not answer: ") as refused:
            send()
        assert "\n" not in str(refused.value)
        assert not allowed(slurm)
        assert not the_runs(tmp_path)
        record("sbatch does not hear the answer", fault, "clear line")
    assert not leftovers(tmp_path)


def test_a_controller_that_is_down_is_asked_later(slurm: Slurm, send: Any, tmp_path: Path, capsys: Any) -> None:
    """It goes down after it has accepted the runs, and before it has said so."""
    slurm.sbatch[2] = (True, "", NO_CONTACT)
    slurm_sbatch = slurm._sbatch

    def down(arguments: list[str]) -> tuple[int, str, str]:
        outcome = slurm_sbatch(arguments)
        if slurm.calls == 2:
            slurm.deaf |= {"squeue", "scontrol", "scancel"}
        return outcome

    slurm._sbatch = down  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"whether the jobs were submitted cannot be told now: repeat the command$"):
        send()
    assert [run.status["state"] for run in the_runs(tmp_path)] == ["queued", "queued"]
    assert status_command.main(["sweep=main", f"output_dir={tmp_path / 'outputs'}"]) == 1
    assert "a submission was interrupted, or goes on; repeating it is safe" in capsys.readouterr().err
    slurm.deaf.clear()
    slurm._sbatch = slurm_sbatch  # type: ignore[method-assign]
    slurm.sbatch.clear()
    send()
    assert "job 102: recovered" in capsys.readouterr().out
    once = sorted(job.id for job in slurm.jobs) == sorted(allowed(slurm)) == ["101", "102_0", "102_1"]
    record("slurmctld goes down", "between the runs' acceptance and the answer", "same bytes" if once else "left over")


def test_a_limit_of_submitted_jobs_leaves_nothing_half_submitted(slurm: Slurm, send: Any, tmp_path: Path) -> None:
    slurm.config = slurm.config.replace("1001", "3\nSchedulerParameters     = bf_interval=1,max_array_tasks=2,defer")
    slurm.sbatch[3] = (False, "", TOO_MANY)  # the rollouts, two runs, and here the third
    with pytest.raises(InputError, match=r"job submit limit.*; submit fewer runs at a time") as refused:
        send(runs=3)
    assert "\n" not in str(refused.value)
    outcome = "left over" if allowed(slurm) or the_runs(tmp_path) or leftovers(tmp_path) else "clear line"
    record("limits of Slurm", "AssocMaxSubmitJobLimit at the second array, max_array_tasks=2", outcome)
    slurm.sbatch.clear()
    send(runs=3)
    assert len(allowed(slurm)) == 4


def test_jobs_that_cannot_be_cancelled_stay_submitted(slurm: Slurm, send: Any, tmp_path: Path, capsys: Any) -> None:
    slurm.sbatch[2] = (False, "", TOO_MANY)
    slurm.deaf.add("scancel")
    with pytest.raises(InputError, match="job submit limit"):
        send()
    assert "Slurm cannot cancel all of the submitted jobs" in capsys.readouterr().out
    slurm.sbatch.clear()
    send()
    once = sorted(job.id for job in slurm.jobs) == sorted(allowed(slurm)) == ["101", "102_0", "102_1"]
    record(
        "limits of Slurm", "the second array is refused, the first not cancelled", "same bytes" if once else "left over"
    )


def test_a_cancelled_part_of_an_array_is_submitted_alone(slurm: Slurm, send: Any, tmp_path: Path) -> None:
    """Slurm forgets at once what was cancelled before it started."""
    send(runs=4)
    slurm.change(lambda job: None if job.id in ("102_1", "102_2") else job)
    told = {each.job: each for each in refresh_run_statuses(the_runs(tmp_path))}
    assert {job: each.state for job, each in told.items()} == {
        "102_0": "queued", "102_1": "failed", "102_2": "failed", "102_3": "queued",
    }  # fmt: skip
    assert "cancelled before it started (scancel)" in told["102_1"].status["error"]
    send(runs=4)
    again = {job.id for job in slurm.jobs} - {"101", "102_0", "102_3"}
    assert {found.job for found in records(tmp_path)} == {"102_0", "102_3"} | again
    record("scancel", "two waiting jobs of an array of four", "same bytes" if len(again) == 2 else "different result")


def test_a_job_whose_folder_of_logs_is_gone_says_so(slurm: Slurm, send: Any, tmp_path: Path) -> None:
    send(runs=1)
    folder = tmp_path / "outputs" / "main" / "slurm"
    shutil.rmtree(folder)
    slurm.change(lambda job: replace(job, state="FAILED", reason="JobLaunchFailure"))  # seen on Slurm 22.05
    (told,) = refresh_run_statuses(the_runs(tmp_path))
    said = told.status["error"]
    right = said == f"Slurm job 102: FAILED (JobLaunchFailure); its folder of logs and code is gone: {folder}"
    record(
        "a folder is gone", "outputs/main/slurm while its job waited", "clear line" if right else "wrong status", said
    )
    send(runs=1)
    assert read_json(record_file(told.run.folder))["job"] == "104"


def test_an_output_folder_that_was_moved(slurm: Slurm, send: Any, tmp_path: Path) -> None:
    """Its jobs write to where it was; what they complete there is not completed here."""
    send(runs=1)
    slurm.change(lambda job: replace(job, state="RUNNING"))
    (run,) = the_runs(tmp_path)
    run.set_state("running", slurm={"job": "102", "cluster": "fake"})
    (tmp_path / "outputs").rename(tmp_path / "moved")
    moved = Run(tmp_path / "moved" / "main" / run.name)
    send(runs=1, folder=tmp_path / "moved")
    assert len(slurm.jobs) == 2  # still in the queue: not submitted twice
    slurm.change(lambda job: replace(job, state="COMPLETED", end=now(hours=1)))
    (told,) = refresh_run_statuses([moved])
    assert told.state == "failed"
    record("a folder is gone", "output_dir moved while its job ran", "clear line", told.status["error"])
    send(runs=1, folder=tmp_path / "moved")
    assert len(slurm.jobs) == 4


def test_two_login_nodes_without_common_locks_submit_once(
    slurm: Slurm, send: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flock` succeeds on each host, as on a file system that keeps locks to itself; process ids mean nothing."""
    monkeypatch.setattr(filelock._unix, "lock_fd_nonblocking", lambda fd: True)
    hosts, sbatch = [], slurm._sbatch

    def reached(host: str, within: float) -> None:
        end = time.monotonic() + within
        while not (tmp_path / host).exists() and time.monotonic() < end:
            time.sleep(0.02)

    for host in ("login1", "login2"):

        def submitting(arguments: list[str], host: str = host) -> tuple[int, str, str]:
            if arguments[0] != "--test-only":
                (tmp_path / host).touch()
                if host == "login1":
                    reached("login2", within=1.0)  # which must not come that far
            return sbatch(arguments)

        slurm._sbatch = submitting  # type: ignore[method-assign]
        child = os.fork()
        if not child:
            try:
                for module in [module for name, module in sys.modules.items() if name.startswith("filelock")]:
                    if hasattr(module, "host_name"):
                        module.host_name = lambda host=host: host  # type: ignore[attr-defined]
                if host == "login2":
                    reached("login1", within=30.0)
                send()
                os._exit(0)
            finally:
                os._exit(1)
        hosts.append(child)
    assert [os.waitpid(child, 0)[1] for child in hosts] == [0, 0]
    once = sorted(job.id for job in slurm.jobs) == sorted(allowed(slurm)) == ["101", "102_0", "102_1"]
    record(
        "two login nodes", "the same command at once, no flock", "same bytes" if once else "left over", str(slurm.jobs)
    )
    assert {found.job for found in records(tmp_path)} == {"102_0", "102_1"}


def test_a_command_that_has_lost_its_lock_submits_nothing(slurm: Slurm, send: Any, monkeypatch: Any) -> None:
    """It was suspended, and another host took over."""
    monkeypatch.setattr(SoftFileLease, "is_lock_held_by_us", property(lambda lease: False))
    with pytest.raises(InputError, match=r"\.slurm\.lease: this command was suspended for long"):
        send()
    assert not slurm.jobs
    record("two login nodes", "suspended until the lock was taken over", "clear line")


@pytest.mark.parametrize("later", [True, False])
def test_of_two_jobs_for_one_run_the_one_that_was_submitted_last_works(
    later: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The other ends at once and waits for no lock. An earlier job's record, which a node may still see, is none."""
    file = tmp_path / "slurm.json"
    job = task.Task(tmp_path, tmp_path / "train.py", {}, None, file)
    submitted = (datetime.now(UTC) + timedelta(seconds=5 if later else -5)).isoformat(timespec="milliseconds")
    write_record(file, SubmissionRecord("13", "fake", "", submitted))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "fake")
    assert job._superseded_by() == ("13" if later else "")
    if later:
        with pytest.raises(SystemExit) as ended:
            job()
        assert ended.value.code == 1
        assert capsys.readouterr().out == "Slurm job 13 was submitted later and does the work of this job, which ends\n"
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert job._superseded_by() == ""
    record("two jobs for one run", "a job starts while the record names another", "clear line")


def test_a_job_does_not_hold_its_allocation_for_a_run_that_another_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run, base = Run(tmp_path / "main" / "sft-matched-s42-01234567"), Run(tmp_path / "main" / "base-tiny-76543210")
    run.set_state("running")
    jobs = sweep_module.SweepJobs()
    jobs._jobs = [None, None]
    jobs._outcomes[1] = sweep_module.Outcome("rft-matched-s42-12345678", "completed")
    jobs._deferred = {0: run, 1: base}
    monkeypatch.setattr(sweep_module, "_PATIENCE_IN_JOB", 0.0)
    monkeypatch.setenv(provenance.JOB_LOG, "log")
    with run.lock(), base.lock():
        assert jobs._next_unlocked() is None
    assert not jobs._deferred
    assert [(outcome.state, outcome.exit_status) for outcome in jobs.outcomes] == [("failed", 1), ("completed", 0)]
    line = f"{run.name}: locked by {run.lock_holder}, which trains it; this job ends"
    assert line in capsys.readouterr().err
    record("two jobs for one run", "both run", "clear line")


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2])
def test_a_job_that_is_preempted_for_good_asks_to_be_requeued(
    signum: signal.Signals, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: Slurm
) -> None:
    """Slurm 22.05 takes that, whatever its PreemptMode is; if it does not, the run says so."""
    run = Run(tmp_path / "main" / "sft-matched-s42-01234567")
    run.set_state("running", step=4, max_steps=9)
    slurm.config = "JobState=COMPLETING StartTime=2026-01-01T10:00:00 PreemptTime=2026-01-01T10:05:00 Restarts=0"
    asked = []

    def requeue(*given: object) -> None:
        asked.append(given)
        if refused:
            raise subprocess.CalledProcessError(1, ["scontrol", "requeue", "12"])

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    job = task.Task(tmp_path, tmp_path / "train.py", {}, run.folder, record_file(run.folder))
    job._handle_preemption(Preempted(signum), requeue)
    assert len(asked) == 1
    told = run.status
    assert told["step"] == 4
    if refused:
        assert (told["state"], told["error"]) == ("preempted", NOT_REQUEUED)
    else:
        assert told["state"] == "running"  # what the interrupted training has written stays
    record("PreemptMode=CANCEL", f"{signum.name}, requeueing {'refused' if refused else 'taken'}", "clear line")


def test_the_words_of_slurm_stand_in_the_table(slurm: Slurm, send: Any, tmp_path: Path, capsys: Any) -> None:
    send(runs=3)
    reasons = ("ReqNodeNotAvail, UnavailableNodes:vm", "launch failed requeued held", "QOSMaxJobsPerUserLimit")
    for number, reason in enumerate(reasons):
        slurm.change(lambda job, n=number, r=reason: replace(job, reason=r) if job.id == f"102_{n}" else job)
    assert status_command.main(["sweep=main", f"output_dir={tmp_path / 'outputs'}"]) == 1
    shown = re.sub(r"[\s│┃]+", " ", capsys.readouterr().out)
    for number, reason in enumerate(reasons):
        said = f"102_{number} PENDING ({reason})" in shown
        record("a job that waits", reason, "clear line" if said else "wrong status", shown)
