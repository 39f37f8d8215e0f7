"""A real vLLM server: started, asked, shown to use the adapters, and stopped.

`make vllm` installs it. LOSSLENS_VLLM names another command that starts it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from losslens.config.data import RolloutConfig
from losslens.config.evaluation import EvaluateConfig
from losslens.config.parse import parse
from losslens.core.errors import InputError, ServerStartError
from losslens.evaluation.outcomes import engine_facts, read_outcomes
from losslens.evaluation.served_weights import require_weights_in_use
from losslens.models.loading import load_model, load_tokenizer
from losslens.models.tokens import encode_prompt
from losslens.pipeline.evaluate_job import evaluate_job
from losslens.rollouts.sample import frozen_rollouts, held_out_problems
from losslens.runs.run import Run, runs_of
from losslens.sampling import supervised, vllm
from losslens.sampling.vllm import BASE_NAME, VllmServer
from tests.conftest import ROOT, base_source

pytestmark = pytest.mark.vllm

COMMAND = os.environ.get("LOSSLENS_VLLM") or f"{ROOT}/.venv-vllm/bin/python -m vllm.entrypoints.openai.api_server"


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    if shutil.which(COMMAND.split()[0]) is None:
        assert "CI" not in os.environ, f"{COMMAND}: not installed (make vllm)"
        pytest.skip(f"{COMMAND}: not installed (make vllm)")


@pytest.fixture(scope="module")
def scored(sweep: Path) -> Iterator[Path]:
    """A sweep that was scored in process, and by vLLM once more; the server still runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        evaluate_job(evaluation(sweep))
        yield sweep
    vllm.stop_vllm()


def composed(name: str, overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, overrides)


def evaluation(sweep: Path, *overrides: str) -> DictConfig:
    fixed = ["benchmark=arithmetic", "benchmark.arithmetic.eval_size=40", "evaluation.engine=vllm"]
    return composed("evaluate", [f"output_dir={sweep}", *fixed, f"evaluation.server.command='{COMMAND}'", *overrides])


def outcomes(run: Run) -> dict[str, Path]:
    """The files of a run's outcomes, by what answered."""
    return {engine_facts(file).get("engine", "transformers"): file for file in (run.folder / "eval").glob("*.parquet")}


def server() -> VllmServer:
    assert vllm._server is not None
    return vllm._server


def prompts(sweep: Path) -> list[tuple[int, ...]]:
    data = parse(EvaluateConfig, evaluation(sweep)).benchmark["arithmetic"]
    tokenizer = load_tokenizer(server().needs.source)
    return [tuple(encode_prompt(tokenizer, problem.prompt)) for problem in held_out_problems(data)]


def test_answers_are_those_of_this_process(scored: Path) -> None:
    """Greedy answers in float32: token for token, for the base and each of six adapters, by one server."""
    runs = runs_of(scored, "main")
    assert len(runs) == 7
    for run in runs:
        files = outcomes(run)
        there, here = (read_outcomes(files[engine]) for engine in ("vllm", "transformers"))
        assert len(there) == 40
        assert there["completion"].tolist() == here["completion"].tolist()
        assert there["tokens"].tolist() == here["tokens"].tolist()
    assert len(list((scored / ".vllm").glob("*.log"))) == 1


def test_the_metadata_say_how_the_weights_were_shown_to_be_in_use(scored: Path) -> None:
    for run in runs_of(scored, "main"):
        facts = engine_facts(outcomes(run)["vllm"])
        assert facts["version"]
        assert facts["batch_invariant"] is False
        assert "--dtype float32" in facts["args"]
        if run.name.startswith("base-"):
            assert "agreement" not in facts
        else:
            found = facts["agreement"]
            assert found["tokens"] > 50
            assert found["weights"] < 1e-6
            assert found["rounding"] < 1e-6
            assert found["slope"] == pytest.approx(1, abs=1e-3)
            assert found["slope_error"] < 1e-3


def test_the_base_or_another_adapter_under_a_runs_name_is_found_out(scored: Path) -> None:
    """A server that ignores adapters, and one that mixes them up: nothing is scored."""
    by_method = {run.name.partition("-")[0]: run for run in runs_of(scored, "main")}
    sft, dpo = by_method["sft"], by_method["dpo"]
    for name in (BASE_NAME, sft.name):
        with pytest.raises(InputError, match="does not answer with these weights; nothing is scored"):
            require_weights_in_use(server(), server().needs.source, name, dpo.name, dpo.adapter, prompts(scored))


def test_weights_that_rounding_hides_are_not_scored(scored: Path, tmp_path: Path) -> None:
    import safetensors.torch

    [run] = [run for run in runs_of(scored, "main") if run.name.startswith("sft-")]
    folder = shutil.copytree(run.adapter, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = {name: w * 1e-9 for name, w in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(weights, file)
    server().load_adapter("small", folder)
    with pytest.raises(InputError, match="rounding hides whether it answers with these weights"):
        require_weights_in_use(server(), server().needs.source, "small", "small", folder, prompts(scored))


def test_an_adapter_that_vllm_cannot_serve_is_refused_in_one_line(scored: Path, tmp_path: Path) -> None:
    [run] = [run for run in runs_of(scored, "main") if run.name.startswith("sft-")]
    folder = shutil.copytree(run.adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"vLLM cannot serve this adapter \(.+\); its log: .+\.log") as caught:
        server().load_adapter("broken", folder)
    assert "\n" not in str(caught.value)


def test_it_listens_here_only_and_wants_the_key(scored: Path) -> None:
    address = str(server().settings.base_url)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{address}/models", timeout=5)
    assert caught.value.code == 401
    port = int(address.rpartition(":")[2].partition("/")[0])
    listening = {c.laddr.ip for c in psutil.net_connections() if c.status == "LISTEN" and c.laddr.port == port}
    assert listening == {"127.0.0.1"}
    key = os.environ["LOSSLENS_VLLM_API_KEY"]
    assert key not in server().log.read_text(encoding="utf-8", errors="replace")
    assert all(key not in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))


def test_rollouts_have_the_log_probabilities_of_the_base(scored: Path, tmp_path: Path) -> None:
    """The base samples with another server, in place of the one before; nothing of either is left."""
    import torch

    before = server()
    settings = [
        f"output_dir={tmp_path}", "rollouts.engine=vllm", f"rollouts.server.command='{COMMAND}'",
        "rollouts.policy=base", "rollouts.temperature=0.7", "data.train_size=8", "rollouts.max_tokens=32",
    ]  # fmt: skip
    rollouts = frozen_rollouts(parse(RolloutConfig, composed("rollout", settings)))
    assert vllm._server is None
    assert before._process.poll() is not None
    assert not [p for p in psutil.process_iter(["cmdline"]) if "vllm.entrypoints" in " ".join(p.info["cmdline"] or [])]
    table = rollouts.table
    assert len(table) == 32
    assert rollouts.manifest["engine"] == "vllm"
    assert len(set(table["completion"])) > 8  # samples of a prompt have seeds of their own
    base = load_model(base_source())
    for row in table.itertuples():
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        with torch.inference_mode():
            logits = base.model(ids).logits[0, len(row.prompt_ids) - 1 : -1]
        raw = logits.log_softmax(-1).gather(-1, ids[0, len(row.prompt_ids) :, None])[:, 0].numpy()
        assert np.allclose(raw, row.sampler_raw_logps, atol=1e-4)


def test_a_server_that_does_not_start_is_tried_once_and_says_why(sweep: Path) -> None:
    before = set((sweep / ".vllm").glob("*.log"))
    settings = ["evaluation.server.args={no_such_option: 1}", "evaluation.max_tokens=63"]
    with pytest.raises(ServerStartError, match=r"\.command: the server ended: .*no-such-option \(log: \S+\.log\)$"):
        evaluate_job(evaluation(sweep, *settings))
    assert vllm._server is None
    assert len(set((sweep / ".vllm").glob("*.log")) - before) == 1


def test_a_command_that_does_not_exist_is_refused(sweep: Path) -> None:
    with pytest.raises(InputError, match=r"evaluation.server.command=/no/vllm serve: no such program; install vLLM"):
        evaluate_job(evaluation(sweep, "evaluation.server.command='/no/vllm serve'", "evaluation.max_tokens=62"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_behind_when_the_process_is_killed(tmp_path: Path, number: int) -> None:
    """The command, and what it has started, end with the process that started them."""
    child = "import subprocess, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); time.sleep(600)"
    parent = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-I', {supervised.__file__!r}, sys.executable, '-c', {child!r}],"
        " stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        grandchild = psutil.Process(int(process.stdout.readline()))
        started = [grandchild, *grandchild.parents()[:2]]
        process.send_signal(number)
        process.wait()
    end = time.monotonic() + 30
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started):
        assert time.monotonic() < end, started
        time.sleep(0.1)
