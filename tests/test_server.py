"""Rollouts and scores from OpenAI-compatible servers, real and faulty ones, each in a separate process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.core import preemption
from losslens.core.completions import Completion, Journal
from losslens.core.errors import InputError
from losslens.core.hashing import hash_text
from losslens.core.preemption import Preempted
from losslens.models.loading import load_model
from losslens.problems.reasoning_gym import ReasoningGym
from losslens.rollouts.frozen import load_rollouts
from losslens.sampling.local import generate_greedy
from losslens.sampling.server import Decoding, Request, ask
from tests.conftest import TINY, base_source, remove_outcomes, script, served_by, start
from tests.test_first_hour import composed
from tools import pretrain

TEACHER = str(TINY / "teacher")
SIZE = ["data.train_size=6", "rollouts.samples_per_prompt=2", "rollouts.max_tokens=64"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """`transformers serve` with the tiny teacher: its address, and its log of requests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", TEACHER, "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"],
            stdout=output,
            stderr=output,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def crooked(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    log = tmp_path / "requests.log"
    with served_by("crooked_server", log) as url:
        yield url, log


def asked(log: Path) -> Counter[str]:
    return Counter(line.partition(" ")[2] for line in log.read_text().splitlines()) if log.exists() else Counter()


def command(output_dir: Path, url: str, model: str, *more: str) -> list[str]:
    where = [f"rollouts.server.base_url={url}", f"rollouts.server.model={model}", f"output_dir={output_dir}"]
    return ["rollout.py", "rollouts.engine=openai", *SIZE, *where, *more]


def answers_of(output_dir: Path) -> list[dict[str, Any]]:
    """Returns the server's completions that are on disk."""
    [file] = (output_dir / "rollouts" / ".answers").glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def rollouts_of(output_dir: Path) -> pd.DataFrame:
    [folder] = (output_dir / "rollouts").glob("arithmetic-*")
    return load_rollouts(folder).table


def test_rollouts_of_a_real_server(served: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = served
    prices = ["rollouts.server.price_prompt=2", "rollouts.server.price_completion=10"]
    outcome = script(*command(tmp_path, url, TEACHER, *prices))
    table = rollouts_of(tmp_path)
    [folder] = (tmp_path / "rollouts").glob("arithmetic-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(table) == 12
    assert set(table["source"]) == {TEACHER}
    assert table["reward"].mean() > 0.5
    assert table["finished"].all()
    assert table["prompt_text"].isna().all()
    assert manifest["completion_tokens"] == table["tokens"].sum()
    expected = (2 * manifest["prompt_tokens"] + 10 * manifest["completion_tokens"]) / 1e6
    assert manifest["cost"] == pytest.approx(expected)
    assert f"cost: {expected:g}" in outcome.stdout
    assert manifest["asked_now"] == 12
    assert manifest["base_url"] == url
    # Prices that come later tell the cost as well.
    doubled = script(
        *command(tmp_path, url, TEACHER, "rollouts.server.price_prompt=4", "rollouts.server.price_completion=20")
    )
    assert f"cost: {2 * expected:g}" in doubled.stdout
    one = script(*command(tmp_path, url, TEACHER, "rollouts.server.price_prompt=4"), check=2)
    assert "price_prompt and price_completion: set both or neither" in one.stderr
    assert "HTTP Request" not in outcome.stdout + outcome.stderr


def test_killed_sampling_resumes_without_repeating_requests(served: tuple[str, Path], tmp_path: Path) -> None:
    """SIGKILL in the middle: completions received so far are kept byte by byte, and only the rest is requested."""
    url, log = served
    # Without those that are refused, one a command: this server knows nothing of token ids.
    answered = 'POST /v1/chat/completions HTTP/1.1" 200'
    before = log.read_text().count(answered)
    line = [*command(tmp_path, url, TEACHER, "rollouts.server.concurrency=1"), "data.train_size=12"]
    answers = tmp_path / "rollouts" / ".answers"
    deadline = time.monotonic() + 120
    with start(*line) as process:
        while sum(file.read_bytes().count(b"\n") for file in answers.glob("*.jsonl")) < 5:
            assert process.poll() is None, process.stderr
            assert time.monotonic() < deadline
            time.sleep(0.02)
    kept = answers_of(tmp_path)
    assert 5 <= len(kept) < 24
    script(*line)
    table = rollouts_of(tmp_path)
    assert len(table) == 24
    assert not table.duplicated(["problem_id", "sample"]).any()
    names = [f"{hash_text(p)} {k}" for p, k in zip(table["prompt"], table["sample"], strict=True)]
    texts = dict(zip(names, table["completion"], strict=True))
    assert all(texts[entry["key"]] == entry["text"] for entry in kept)
    # One request was under way when the process was killed.
    assert 24 <= log.read_text().count(answered) - before <= 25


def test_transient_failures_are_retried(crooked: tuple[str, Path], tmp_path: Path) -> None:
    url, log = crooked
    script(*command(tmp_path, url, "flaky"))
    assert len(rollouts_of(tmp_path)) == 12
    assert set(asked(log).values()) == {4}


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("always429", "no answer in 3 attempts; last error: Error code: 429"),
        ("always500", "no answer in 3 attempts; last error: Error code: 500"),
        ("garbage", "no answer in 3 attempts"),
        ("empty", "no completion in the response"),
        ("closes", "no answer in 3 attempts; last error: Connection error"),
        ("silent", "no answer in 3 attempts; last error: Request timed out"),
        ("spent", "no money left"),
        ("unknown", "no such model"),
    ],
)
def test_permanent_failures_are_reported_in_one_line(
    crooked: tuple[str, Path], tmp_path: Path, model: str, told: str
) -> None:
    url, log = crooked
    limits = ["rollouts.server.attempts=3", "rollouts.server.concurrency=2", "rollouts.server.timeout=1"]
    outcome = script(*command(tmp_path, url, model, *limits), check=1)
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("rollout.py:")]
    assert len(lines) == 1, repr(outcome.stderr)
    assert "rollouts.server: " in lines[0]
    assert told in lines[0]
    assert "Traceback" not in outcome.stderr
    assert max(asked(log).values()) == (1 if model in ("spent", "unknown") else 3)


def test_completions_are_kept_if_the_server_fails(tmp_path: Path) -> None:
    """Three servers in turn at different addresses: each returns five completions and then fails."""
    log = tmp_path / "requests.log"
    limits = ["rollouts.server.attempts=1", "rollouts.server.concurrency=1"]
    for number, check in ((1, 1), (2, 1), (3, 0)):
        with served_by("crooked_server", log) as url:
            script(*command(tmp_path, url, "dies", *limits), check=check)
        assert len(answers_of(tmp_path)) == min(5 * number, 12)
    assert len(rollouts_of(tmp_path)) == 12
    # The sixth and the eleventh failed, and were asked again; no other was.
    assert sorted(asked(log).values()) == [1] * 10 + [2] * 2


def test_existing_completions_are_reused_for_more_prompts(crooked: tuple[str, Path], tmp_path: Path) -> None:
    url, log = crooked
    script(*command(tmp_path, url, "good"))
    outcome = script(*command(tmp_path, url, "good"), "data.train_size=8", "data.source.reads=last_number")
    assert "reusing 12 of 16 completions of good" in outcome.stdout
    assert len(asked(log)) == 16
    assert set(asked(log).values()) == {1}
    script(*command(tmp_path, url, "good"), "rollouts.temperature=0.5")
    assert sum(asked(log).values()) == 28


def test_ctrl_c_waits_for_pending_requests(crooked: tuple[str, Path], tmp_path: Path) -> None:
    url, log = crooked
    line = command(tmp_path, url, "slow", "rollouts.server.concurrency=3")
    with start(*line) as process:
        while len(asked(log)) < 5:
            assert process.poll() is None, process.stderr
            time.sleep(0.02)
        process.signal(signal.SIGINT)
        assert process.wait() == 130
        assert "interrupted; run the same command to resume" in process.stderr
    assert len(answers_of(tmp_path)) == len(asked(log)) < 12
    script(*line)
    assert len(asked(log)) == 12
    assert set(asked(log).values()) == {1}


class _Client:
    """A client whose server answers after `seconds`, and within a callback of the loop after the tenth request a signal
    arrives."""

    def __init__(self, signum: signal.Signals, seconds: float, **_: Any) -> None:
        self.signum, self.seconds, self.count = signum, seconds, 0
        self.chat = self.completions = self

    async def __aenter__(self) -> _Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def create(self, **_: Any) -> Any:
        self.count += 1
        if self.count == 10:
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), self.signum)
        await asyncio.sleep(self.seconds)
        choice = SimpleNamespace(finish_reason="stop", text="7")
        return SimpleNamespace(choices=[choice], usage=None)


def _ask(
    monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, seconds: float
) -> tuple[int, dict[str, Any], Preempted | None]:
    """The number of requests sent of 300, four at a time, what is kept of them, and how they were stopped."""
    kept: dict[str, Any] = {}
    client = _Client(signum, seconds)
    monkeypatch.setattr("openai.AsyncOpenAI", lambda **_: client)
    url = "rollouts.server.base_url=http://127.0.0.1:1"
    config = composed("rollouts.engine=openai", "rollouts.server.model=x", url, "rollouts.server.concurrency=4")
    server = parse(TrainConfig, config).rollouts.server
    requests = {str(number): Request("?", None) for number in range(300)}
    try:
        ask("rollouts.server", server, "x", requests, Decoding(1, 1, 8), kept.__setitem__, "asked")
    except Preempted as stop:
        return client.count, kept, stop
    return client.count, kept, None


@pytest.fixture
def preemptible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(preemption, "_received", None)
    preemption.install_handlers(signal.SIGTERM)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("preemptible")
def test_a_scheduler_signal_in_a_callback_waits_for_pending_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, kept, stop = _ask(monkeypatch, signal.SIGTERM, 0.02)
    assert stop is not None
    assert stop.signal == signal.SIGTERM
    assert 10 <= sent == len(kept) < 100


@pytest.mark.usefixtures("preemptible")
def test_a_scheduler_signal_does_not_wait_for_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("losslens.sampling.server._GRACE", 0.05)
    before = _Client.create

    async def create(client: _Client, **fields: Any) -> Any:
        client.seconds = 600 if client.count >= 9 else 0
        return await before(client, **fields)

    monkeypatch.setattr(_Client, "create", create)
    sent, kept, stop = _ask(monkeypatch, signal.SIGTERM, 0)
    assert stop is not None
    assert sent - 4 == len(kept) == 9


@pytest.mark.usefixtures("preemptible")
def test_a_worker_leaves_ctrl_c_to_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, kept, _ = _ask(monkeypatch, signal.SIGINT, 0)
    assert len(kept) == 300
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_server_without_token_counts(crooked: tuple[str, Path], tmp_path: Path) -> None:
    """No usage and a lone surrogate in the text: a valid completion of unknown length."""
    script(*command(tmp_path, crooked[0], "uncounted", "rollouts.server.extra_body={seed: null, top_p: 0.5}"))
    table = rollouts_of(tmp_path)
    assert set(table["completion"]) == {"? <answer>7</answer>"}
    assert table["tokens"].isna().all()
    # Twelve requests in which no seed was sent.
    assert {json.loads(key)[2] for key in asked(crooked[1])} == {None}
    assert sum(asked(crooked[1]).values()) == 12


def test_a_completion_truncated_during_reasoning(crooked: tuple[str, Path], tmp_path: Path) -> None:
    outcome = script(*command(tmp_path, crooked[0], "long"))
    table = rollouts_of(tmp_path)
    assert set(table["completion"]) == {"<think>\nhm"}
    assert not table["finished"].any()
    assert "12 of 12 completions were truncated (rollouts.max_tokens=64)" in outcome.stdout


def test_separate_reasoning_is_kept(crooked: tuple[str, Path], tmp_path: Path) -> None:
    script(*command(tmp_path, crooked[0], "reasons"))
    assert set(rollouts_of(tmp_path)["completion"]) == {"<think>\n3 + 4 = 7\n</think>\n\n<answer>7</answer>"}


def test_requests_are_spaced_by_the_rate_limit(crooked: tuple[str, Path], tmp_path: Path) -> None:
    """At 240 a minute twelve requests begin in no less than 11 · 0.25 s, however many may be under way.

    The first may reach the server late; without a limit all would be there in a few hundredths of a second.
    """
    script(*command(tmp_path, crooked[0], "good", "rollouts.server.requests_per_minute=240"))
    times = sorted(float(line.split()[0]) for line in crooked[1].read_text().splitlines())
    assert len(times) == 12
    assert times[-1] - times[0] > 2


def test_keys_are_read_from_the_environment_and_never_written(
    crooked: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    script(*command(tmp_path, crooked[0], "good", "rollouts.server.api_key_env=MY_KEY"))
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"sk-very-secret" not in file.read_bytes()
    for address in ("http://me:pw@host/v1", "http://host/v1?key=x", "localhost:8000/v1", "me:pw@host/v1"):
        outcome = script(*command(tmp_path, f"'{address}'", "good"), check=2)
        assert "rollouts.server.base_url: must" in outcome.stderr
    outcome = script(*command(tmp_path, crooked[0], "good", "+rollouts.server.api_key=x"), check=2)
    assert "rollouts.server.api_key" in outcome.stderr


def test_an_address_or_a_key_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    outcome = script("rollout.py", f"output_dir={tmp_path}", "rollouts.engine=openai", *SIZE, check=2)
    assert "rollouts.server.model=NAME" in outcome.stderr
    more = ["rollouts.engine=openai", "rollouts.server.model=gpt", *SIZE]
    outcome = script("rollout.py", f"output_dir={tmp_path}", *more, check=2)
    assert "rollouts.server.base_url: set the server's address" in outcome.stderr


def test_a_journal_drops_only_an_incomplete_last_line(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    journal = Journal(file)
    journal.add({"0": Completion("a", 1, True)}, state="s1")
    journal.add({"1": Completion("b\u2028\n", None, False, 7)})
    journal.close()
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"key": "2", "text": "c')
    again = Journal(file)
    assert again.completions == {"0": Completion("a", 1, True), "1": Completion("b\u2028\n", None, False, 7)}
    assert again.up_to_state() == {"0": Completion("a", 1, True)}
    assert again.state == "s1"
    again.add({"2": Completion("c", 1, True)})
    again.close()
    assert set(Journal(file).completions) == {"0", "1", "2"}
    lines = whole.splitlines(keepends=True)
    for damage in (b"x", b"[]", b"{}", b'{"key": "0"}', b'{"state": "s1"}'):  # the last one is an older version's
        damaged = b"".join([lines[0], damage + b"\n", *lines[2:]])
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"j\.jsonl: line 2 is damaged"):
            Journal(file)
        assert file.read_bytes() == damaged


def test_scoring_with_a_server(served: tuple[str, Path], sweep: Path) -> None:
    """What the server answers greedily is what the model that it serves answers in this process.

    It serves no adapter, and says so; `test_an_adapter_that_the_server_lacks` has one that does.
    """
    url, _ = served
    where = ["evaluation.engine=openai", f"evaluation.server.base_url={url}", f"evaluation.server.model={TEACHER}"]
    size = [
        "benchmark.arithmetic_long.eval_size=4",
        "evaluation.max_tokens=64",
        "benchmark.arithmetic_long.name=by_server",
    ]
    line = ["evaluate.py", "sweep=main", f"output_dir={sweep}", "benchmark=arithmetic_long", *size, *where]
    outcome = script(*line, "evaluation.server.attempts=1", check=1)
    assert "evaluation.server: " in outcome.stderr
    [file] = sweep.glob("main/*/eval/by_server.parquet")
    assert file.parts[-3].startswith("base-")
    outcomes = pd.read_parquet(file)
    loaded = load_model(base_source(path=TEACHER))
    source = ReasoningGym("chain_sum", {**pretrain.DIFFICULTY, "min_terms": 6}, pretrain_share=pretrain.SHARE)
    prompts = [problem.prompt for problem in source.problems("eval", 4, seed=0)]
    answers = generate_greedy(loaded.model, loaded.tokenizer, prompts, max_new_tokens=64, batch_size=4)
    assert list(outcomes["completion"]) == [answer.text for answer in answers]
    file.unlink()
    refused = script(*[part for part in line if "server.model" not in part], check=None)
    assert "evaluation.server.model is required: the server's name for the base" in refused.stderr


def test_an_adapter_that_the_server_lacks(crooked: tuple[str, Path], sweep: Path) -> None:
    """Adapters are requested by their runs' names; this server lacks only `unknown`."""
    url, log = crooked
    where = ["evaluation.engine=openai", f"evaluation.server.base_url={url}", "evaluation.server.model=unknown"]
    size = ["benchmark.arithmetic_long.eval_size=2", "benchmark.arithmetic_long.name=by_crooked"]
    line = ["evaluate.py", "sweep=main", f"output_dir={sweep}", "benchmark=arithmetic_long", *size, *where]
    outcome = script(*line, check=1)
    assert "evaluation.server: " in outcome.stderr
    assert "no such model" in outcome.stderr
    runs = {path.parts[-3] for path in sweep.glob("main/*/eval/by_crooked.parquet")}
    assert len(runs) == 6
    assert runs == {json.loads(key)[0] for key in asked(log)} - {"unknown"}
    for file in sweep.glob("main/*/eval/by_crooked*.parquet"):
        remove_outcomes(file)
    for file in sweep.glob("main/*/eval/*by_crooked*"):
        file.unlink()
