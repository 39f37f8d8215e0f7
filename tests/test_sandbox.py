"""Answers are not evaluated, and code that runs anyway can neither read secrets nor send them anywhere."""

from __future__ import annotations

import inspect
import json
import os
import re
import socket
import sys
import threading
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from losslens.core.errors import InputError
from losslens.problems import Problem, Verdict
from losslens.problems import reasoning_gym as tasks
from losslens.problems.mathematics import MathVerify
from losslens.problems.plain import is_arithmetic, is_formula, is_literal
from losslens.problems.reasoning_gym import ReasoningGym, TaskScorer
from losslens.problems.verification import verdicts

KEY = "sk-of-the-parent-alone"
NOT_RUN = ("-1", "32512")  # what os.system gives where no process could be made
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's walls are Linux's")


@dataclass(frozen=True)
class Evaluates:
    """An unsafe verifier: runs the completion and returns the result."""

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        return Verdict(repr(eval(completion)), True)


class EvaluatesOnline(Evaluates):
    """The same, as a verifier that needs the network."""

    needs_network = True


def told(verifier: Any, *completions: str, seconds: float = 20) -> list[Verdict]:
    return verdicts(verifier, [Problem("x", "?", "1")] * len(completions), completions, seconds)


def attempts(file: Path, port: int) -> list[str]:
    """Attacks by code in an answer."""
    me = os.getpid()
    return [
        f"open({str(file)!r}, 'w').write('x')",
        f"open({str(file.with_name('there'))!r}, 'r+').write('x')",
        f"__import__('pathlib').Path({str(file)!r}).touch()",
        f"__import__('os').mkdir({str(file)!r})",
        f"__import__('os').remove({str(file.with_name('there'))!r})",
        f"__import__('os').symlink('/', {str(file)!r})",
        f"__import__('os').truncate({str(file.with_name('there'))!r}, 0)",
        f"__import__('os').system('touch {file}')",
        f"__import__('subprocess').run(['touch', {str(file)!r}])",
        f"__import__('os').execv('/bin/touch', ['touch', {str(file)!r}])",
        "__import__('os').fork()",
        f"__import__('socket').create_connection(('127.0.0.1', {port}))",
        "__import__('socket').socketpair()",
        f"open('/proc/{me}/environ').read()",
        f"open({str(file.with_name('there'))!r}).read()",
        f"__import__('os').listdir({str(file.parent)!r})",
        f"__import__('os').kill({me}, 9)",
    ]


@pytest.fixture
def port() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("kind", ["guarded", pytest.param("unguarded", marks=LINUX)])
def test_code_in_an_answer_cannot_escape(kind: str, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all layers, and with the kernel's only."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    from tests.unguarded import Unguarded

    (tmp_path / "there").write_text(KEY)
    tries = attempts(tmp_path / "made", port)
    fine = [
        "dict(__import__('os').environ)",
        "1 + 1",
        "__import__('wave').__name__",
        "__import__('threading').active_count()",
    ]
    found = told(Evaluates() if kind == "guarded" else Unguarded(), *fine, *tries)
    assert [verdict.answer for verdict in found[:4]] == ["{}", "2", "'wave'", "1"]
    for attempt, verdict in zip(tries, found[4:], strict=True):
        assert verdict.trouble or verdict.answer in NOT_RUN, (attempt, verdict)
        assert KEY not in str(verdict)
    assert [file.name for file in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == KEY


def test_a_verifier_with_network_access_cannot_write(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    tries = attempts(tmp_path / "made", port)
    (tmp_path / "there").write_text("mine")
    asks = f"__import__('socket').create_connection(('127.0.0.1', {port})).getpeername()[1]"
    environment, asked, own, *found = told(
        EvaluatesOnline(), "__import__('os').environ['OPENAI_API_KEY']", asks,
        f"open({str(tmp_path / 'there')!r}).read()", *tries[:11],
    )  # fmt: skip
    assert environment.answer == repr(KEY)
    assert asked.answer == str(port)
    assert own.answer == "'mine'"
    assert all(verdict.trouble or verdict.answer in NOT_RUN for verdict in found)
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_responses_of_the_process_are_validated_and_never_unpickled() -> None:
    """Code that controls the process can lie about the answer, but do no more."""
    lies = [
        'b"\\x80\\x04\\x95"', '[]', '{"answer": 5, "correct": "yes", "trouble": ["x"]}', "nothing",
        '{"answer": "\\ud83d", "correct": true}',
    ]  # fmt: skip
    writes = "[__import__('os').write(number, {said!r}.encode() + b'\\n') for number in (3, 4)]"
    for lie in lies:
        [verdict] = told(Evaluates(), writes.format(said=lie))
        assert isinstance(verdict.answer, (str, type(None)))
        assert isinstance(verdict.correct, bool)
        str(verdict.answer).encode()
    told(Evaluates(), "__import__('os')._exit(3)")
    assert told(Evaluates(), "6 * 7")[0].answer == "42"


def test_a_verifier_that_cannot_be_loaded_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    only_here = types.ModuleType("only_here")
    only_here.Own = type("Own", (Evaluates,), {"__module__": "only_here", "__qualname__": "Own"})  # type: ignore
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    with pytest.raises(InputError, match=r"verifier only_here\.Own cannot be loaded: ModuleNotFoundError"):
        told(only_here.Own(), "1")
    with pytest.raises(InputError, match=r"cannot be sent to the verification process"):
        told(lambda problem, completion: Verdict("1", True), "1")


def test_threads_receive_their_own_verdicts() -> None:
    answers: dict[int, str | None] = {}
    told(Evaluates(), "1")  # the process ends with the thread that began it

    def ask(number: int) -> None:
        answers[number] = told(Evaluates(), f"{number} * 10")[0].answer

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number * 10) for number in range(8)}


# Of each task whose entries hold no answer, how one is read out of them; two have none that is easily found.
MADE = {
    "graph_color": lambda entry: json.dumps(entry["metadata"]["possible_answer"]),
    "propositional_logic": lambda entry: entry["metadata"]["example_answer"],
    "rubiks_cube": lambda entry: entry["metadata"]["example_correct_answer"],
}
NO_ANSWER = {"boxnet", "rush_hour"}
NOT_MADE = {"composite"}  # of others, which no configuration can name
HOSTILE = (
    "[open({file!r},'w').write(os.environ['OPENAI_API_KEY'])]",
    "[__import__('pathlib').Path({file!r}).write_text('x')]",
    "__import__('os').system('touch {file}')",
    'S(\'__import__("os").system("touch {file}")\')',
    "[[x for x.y in [1]]]",
    "(lambda: 1)()",
    "().__class__.__base__.__subclasses__()",
    "9**9**9**9**9",
    "(((9999999!)!)!)!",
    "[" * 3000,
)


def test_every_task_of_reasoning_gym(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct answers are correct, hostile ones are incorrect within the time limit and have no effect."""
    from reasoning_gym.factory import DATASETS

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    hostile = [text.format(file=str(tmp_path / "made")) for text in HOSTILE]
    wrong = []
    for task in sorted(set(DATASETS) - NOT_MADE):
        entry = tasks._dataset(task, {}, seed=3, size=2)[0]
        answer = MADE.get(task, lambda entry: entry["answer"])(entry)
        problem = Problem("x", entry["question"], str(answer), entry)
        verifier = TaskScorer(task, "{}", "answer_tag")
        # In some tasks an answer is right whatever it is; what counts is that it does nothing.
        texts = [f"<answer>{text}</answer>" for text in (problem.answer, *hostile)]
        right, *found = verdicts(verifier, [problem] * len(texts), texts, seconds=20)
        if not right.correct and task not in NO_ANSWER:
            wrong.append((task, right))
        late = [
            (text, verdict) for text, verdict in zip(hostile, found, strict=True) if "not verified" in verdict.trouble
        ]
        wrong += [(task, *each) for each in late]
        assert KEY not in str(found)
    assert not wrong
    assert not list(tmp_path.iterdir())


def test_scorers_that_evaluate_never_see_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sandbox: the scorer is called in the process of the tests."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for task in tasks._EVALUATED:
        entry = tasks._dataset(task, {}, seed=3, size=2)[0]
        for text in HOSTILE:
            answer = f"<answer>{text.format(file=str(tmp_path / 'made'))}</answer>"
            assert not TaskScorer(task, "{}", "answer_tag")(Problem("x", "?", "", entry), answer).correct
    # A composite task's problem names the task whose scorer gets the answer.
    with pytest.raises(InputError, match=r"source\.task=composite"):
        ReasoningGym("composite", {"datasets": [{"name": "countdown", "weight": 1}]}).problems("eval", 1, seed=0)
    assert not list(tmp_path.iterdir())


def test_the_list_of_scorers_that_evaluate_is_complete() -> None:
    """Fails for a version of reasoning-gym with a further one."""
    from reasoning_gym.factory import DATASETS

    evaluates = re.compile(
        r"(?<![\w.])(?:eval|exec|compile|__import__)\(|sympify|literal_eval|(?<!def )\bparse_expr\(|subprocess|pickle"
    )
    found = set()
    for task, (kind, _) in DATASETS.items():
        if evaluates.search(inspect.getsource(sys.modules[kind.__module__])):
            found.add(task)
    # These evaluate what they made themselves; the last one's `parse_expr` is its own.
    own = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic"}
    assert found - own == set(tasks._EVALUATED)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (
            is_literal,
            ["[['_', 'Q'], ['Q', '_']]", "[1, -2.5, 3]", "_ _ Q _\n_ Q _ _", "ABCD", "0 1\n1 0", "('a', 'b')"],
            ["['a'] * 3", "f()", "[f'{x()}']", "x.y", "[x for x in y]", "a[0]", "lambda: 0", "[open]()", "x:=1"],
        ),
        (
            is_arithmetic,
            ["3 * (4 + 5) - -6 / 2", "2**10", "8 // 3 % 2", " 1.5+2 "],
            ["x + 1", "f(1)", "9**9**9", "9**1000", "(1).real", "'a' * 3", "True + 1", "[1]", "1 if 2 else 3"],
        ),
        (
            is_formula,
            ["x**3/3 + C", "-2*x**2*cos(3*x + 1)/3 + sin(x)**2", "log(Abs(x))*exp(-x) + sqrt(x)", "10*x*y - 3"],
            ["S('x')", "sympify('x')", "x.subs(1)", "__import__('os')", "exit()", "sin(x, y==f())"],
        ),
    ],
)  # fmt: skip
def test_literals_and_formulas_are_distinguished_from_code(check: Any, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right if not check(text)] == []
    assert [text for text in wrong if check(text)] == []


class Watched(MathVerify):
    """Returns, instead of the answer, everything that was compiled or run during verification."""

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        compiled: list[str] = []
        watching = [True]

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if watching[0] and event in ("compile", "os.system"):
                compiled.append(str(arguments[0]))

        sys.addaudithook(watch)
        super().__call__(problem, completion)
        watching[0] = False
        return Verdict("\n".join(compiled), False)


def test_math_verify_does_not_compile_answers() -> None:
    code = "__import__('os').system('marker')"
    texts = [
        f"\\boxed{{{code}}}", f"${code}$", f"<answer>{code}</answer>", f"\\boxed{{\\text{{{code}}}}}", code,
        f"\\boxed{{\\operatorname{{system}}({code})}}", f"\\boxed{{x_{{{code}}}}}", f"1 + {code}", f"is 1*({code})",
        f"\\boxed{{\\begin{{pmatrix}} {code} \\end{{pmatrix}}}}", f"\\boxed{{\\sqrt{{{code}}} = {code}}}",
    ]  # fmt: skip
    for text, verdict in zip(texts, told(Watched(), *texts), strict=True):
        assert verdict.answer is None or "marker" not in verdict.answer, text


def test_verification_takes_milliseconds() -> None:
    told(Evaluates(), "1")
    started = time.monotonic()
    assert len(told(Evaluates(), *["1 + 1"] * 500)) == 500
    assert time.monotonic() - started < 5


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a numeric user: without an environment, the home folder is unknown."""
    import pwd

    from losslens.problems import sandbox

    def nobody(_: int) -> Any:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    assert os.path.realpath(sys.prefix) in sandbox._readable("json")
