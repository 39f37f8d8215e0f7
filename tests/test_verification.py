"""Verification respects the time limit for any answer, and agrees with math-verify."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from losslens.core.errors import InputError
from losslens.problems import Problem, Verdict
from losslens.problems.mathematics import MathVerify
from losslens.problems.reasoning_gym import ReasoningGym
from losslens.problems.verification import verdicts


def problem(answer: str) -> Problem:
    return Problem("id", "?", answer)


@pytest.mark.parametrize(
    ("reference", "completion", "correct"),
    [
        ("72", "so there are 72.", True),
        ("72", "so there are 71.", False),
        ("1,000", "that is $1000$", True),
        (r"\frac{1}{2}", r"hence \boxed{0.5}", True),
        (r"\frac{1}{2}", r"hence \boxed{0.51}", False),
        ("(1,2)", r"\boxed{(1, 2)}", True),
        ("(1,2)", r"\boxed{(2, 1)}", False),
        ("27", r"\boxed{027}", True),
        ("5", "first 4, then <answer>5.0</answer>, not 6", True),
        ("5", r"<think>it is \boxed{4}</think> It is \boxed{5}.", True),
        ("5", r"\boxed{4} no, \boxed{5}", True),
        ("5", r"<think>perhaps \boxed{4}</think> It is 5.", True),
        ("5", "", False),
        ("5", "no number", False),
        ("$x+1$", r"\boxed{1+x}", True),
    ],
)
def test_math_verify(reference: str, completion: str, correct: bool) -> None:
    assert MathVerify()(problem(reference), completion).correct is correct


def test_the_verdict_contains_the_extracted_answer() -> None:
    assert MathVerify()(problem("5"), r"so \boxed{7}").answer == "7"
    assert MathVerify()(problem("5"), "no").answer is None


# `**` inside one C call, factorials of factorials, and brackets without end: none of them heeds a signal.
HOSTILE = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{((((9999999!)!)!)!)}", r"\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}"]


def test_a_hostile_answer_costs_only_its_time_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    completions = [r"\boxed{0.5}", *HOSTILE, "1/2", "3"]
    started = time.monotonic()
    found = verdicts(MathVerify(), [problem("1/2")] * len(completions), completions, seconds=2)
    assert [verdict.correct for verdict in found] == [True, False, False, False, True, False]
    assert [bool(verdict.trouble) for verdict in found] == [False, True, True, True, False, False]
    assert time.monotonic() - started < 120
    output = capsys.readouterr().out
    assert "3 of 6 answers could not be verified and count as incorrect; first: not verified within 2 s" in output


@dataclass(frozen=True)
class Wrecker:
    """A verifier that fails as a broken scorer might."""

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        if completion == "memory":
            return Verdict(str(len(bytearray(1 << 40))), True)
        if completion == "die":
            os._exit(3)
        if completion == "raise":
            raise ValueError("what is this\nsecond line")
        if completion == "settings":
            raise InputError("data.source.task: wrong")
        return Verdict(completion, True)


def test_answers_whose_verification_fails_count_as_incorrect() -> None:
    completions = ["fine", "memory", "die", "raise", "fine"]
    found = verdicts(Wrecker(), [problem("1")] * 5, completions, seconds=20)
    assert [verdict.correct for verdict in found] == [True, False, False, False, True]
    assert "memory" in found[1].trouble
    assert "crashed" in found[2].trouble
    assert found[3].trouble == "verification failed: ValueError: what is this"


def test_invalid_settings_are_an_input_error() -> None:
    with pytest.raises(InputError, match=r"data\.source\.task"):
        verdicts(Wrecker(), [problem("1")], ["settings"], seconds=20)


def test_scorers_of_reasoning_gym_run_in_the_process() -> None:
    source = ReasoningGym("chain_sum", {"min_terms": 2, "max_terms": 2}, reads="last_number")
    [asked] = source.problems("eval", 1, seed=0)
    found = verdicts(source.verifier, [asked, asked], [f"it is {asked.answer}", "it is 0.5"], seconds=20)
    assert [verdict.correct for verdict in found] == [True, False]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no kernel ends the child of a killed process")
def test_the_process_ends_if_its_parent_is_killed(tmp_path: Path) -> None:
    """The verifier is inside one long C call when its parent receives SIGKILL."""
    script = tmp_path / "hang.py"
    script.write_text(HANGING)
    process = subprocess.Popen([sys.executable, str(script)])
    children = Path(f"/proc/{process.pid}/task")

    def busy() -> list[int]:
        pids = [int(pid) for file in children.glob("*/children") for pid in file.read_text().split()]
        return [pid for pid in pids if seconds_of(pid) > 4]

    deadline = time.monotonic() + 60
    while not busy():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    [worker] = busy()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


HANGING = """
from losslens.problems import Problem
from losslens.problems.mathematics import MathVerify
from losslens.problems.verification import verdicts
if __name__ == "__main__":
    verdicts(MathVerify(), [Problem("id", "?", "1")], [r"\\boxed{9^{9^{9^{9}}}}"], seconds=600)
"""


def seconds_of(pid: int) -> float:
    """Returns the CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
