"""The proof that a server answers with the trained weights, against servers that answer with other ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from losslens.core.completions import Completion
from losslens.core.errors import InputError
from losslens.evaluation import served_weights
from losslens.evaluation.served_weights import require_weights_in_use
from losslens.models.loading import LoadedModel, ModelSource, load_model
from losslens.models.tokens import encode_prompt
from losslens.models.trained_weights import with_weights
from losslens.runs.run import Run, runs_of
from losslens.sampling.server import Decoding, Request
from losslens.sampling.vllm import BASE_NAME
from tests.conftest import base_source

TOKENS = 8


@pytest.fixture(scope="module")
def prompts(base: LoadedModel) -> list[tuple[int, ...]]:
    return [tuple(encode_prompt(base.tokenizer, f"What is {a} + {b} − {a + 3}?")) for a, b in ((3, 9), (7, 4), (8, 8))]


@pytest.fixture(scope="module")
def runs(sweep: Path) -> list[Run]:
    return [run for run in runs_of(sweep, "main") if not run.name.startswith("base-")]


@lru_cache(maxsize=32)
def answer(folder: Path | None, ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """A greedy answer of the base with the weights in a folder, and its log-probabilities."""
    base = load_model(base_source()).model
    tokens, logps = list(ids), []
    with with_weights(base, folder) if folder else _as_it_is(base) as model, torch.inference_mode():
        for _ in range(TOKENS):
            values = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(values.argmax()))
            logps.append(float(values.max()))
    return tuple(tokens[len(ids) :]), tuple(logps)


class _as_it_is:  # noqa: N801
    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> Any:
        return self.model

    def __exit__(self, *_: object) -> None:
        pass


class Server(SimpleNamespace):
    """A server in this process, which answers with the weights that it has under a name, and with noise if asked to."""

    weights: Mapping[str, Path | None]
    noise: float = 0.0
    whole: Path | None = None
    log = "the log"

    def __hash__(self) -> int:
        return id(self)

    @property
    def needs(self) -> Any:
        return SimpleNamespace(weights=self.whole)

    def ask(
        self,
        model: str,
        requests: Mapping[str, Request],
        decoding: Decoding,
        keep: Callable[[str, Completion], None],
        description: str,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        for number, request in requests.items():
            assert request.prompt_ids is not None
            ids, logps = answer(self.weights[model], request.prompt_ids)
            noise = self.noise * torch.randn(len(logps), generator=generator)
            noisy = tuple(float(each) for each in torch.tensor(logps) + noise)
            keep(number, Completion("", len(ids), True, ids=ids, sampler_raw_logps=noisy))


def proof(server: Server, run: Run, prompts: list[tuple[int, ...]], source: ModelSource | None = None) -> Any:
    return require_weights_in_use(server, source or base_source(), run.name, run.name, run.adapter, prompts)  # type: ignore[arg-type]


def test_no_mix_up_of_six_adapters_and_the_base_is_accepted(runs: list[Run], prompts: list[tuple[int, ...]]) -> None:
    """Also of losses whose updates are much alike, as those of RFT and RIFT are."""
    assert len(runs) == 6
    for claimed in runs:
        for served in [*runs, None]:
            folder = None if served is None else served.adapter
            server = Server(weights={claimed.name: folder, BASE_NAME: None})
            if served == claimed:
                found = proof(server, claimed, prompts)
                assert found["slope"] == pytest.approx(1, abs=1e-3)
                assert found["weights"] < 1e-6
            else:
                with pytest.raises(InputError, match="does not answer with these weights; nothing is scored"):
                    proof(server, claimed, prompts)


def test_weights_that_are_nearly_those_are_refused(
    runs: list[Run], prompts: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """An update of nine tenths has a slope near 1; only rounding that is known to be smaller tells it apart."""
    folder = shutil.copytree(runs[0].adapter, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    scaled = {name: 0.9 * w if "lora_B" in name else w for name, w in weights.items()}
    safetensors.torch.save_file(scaled, file)
    with pytest.raises(InputError, match="does not answer with these weights"):
        proof(Server(weights={runs[0].name: folder, BASE_NAME: None}), runs[0], prompts)


def test_rounding_that_hides_single_tokens_averages_out(runs: list[Run], prompts: list[tuple[int, ...]]) -> None:
    """Noise of half the size of the change leaves weights and base apart; noise of twice its size does not."""
    run = runs[0]
    right, wrong = ({run.name: folder, BASE_NAME: None} for folder in (run.adapter, None))
    found = proof(Server(weights=right), run, prompts)
    answers = served_weights._greedy(Server(weights=right), run.name, base_source(), prompts)  # type: ignore[arg-type]
    w, b = (served_weights._local_logps(base_source(), folder, answers) for folder in (run.adapter, None))
    size = float(np.sqrt(np.mean((w - b) ** 2)))
    noisy = proof(Server(weights=right, noise=size / 2), run, prompts)
    assert noisy["slope_error"] == pytest.approx(0.5 / len(w) ** 0.5, rel=0.5)
    assert noisy["slope"] == pytest.approx(1, abs=4 * noisy["slope_error"])
    assert found["slope_error"] < 1e-3
    with pytest.raises(InputError, match=r"does not answer with these weights|rounding hides"):
        proof(Server(weights=wrong, noise=size / 2), run, prompts)
    with pytest.raises(InputError, match="rounding hides whether it answers with these weights"):
        proof(Server(weights=right, noise=2 * size), run, prompts)


def test_rounding_has_an_upper_limit(runs: list[Run], prompts: list[tuple[int, ...]]) -> None:
    """However large the difference is on the base, it is no rounding."""
    run = runs[0]
    with pytest.raises(InputError, match="does not answer with these weights"):
        proof(Server(weights={run.name: run.adapter, BASE_NAME: None}, noise=1.0), run, prompts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    runs: list[Run], prompts: list[tuple[int, ...]], tmp_path: Path, value: float
) -> None:
    folder = shutil.copytree(runs[0].adapter, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    next(w for name, w in weights.items() if "lora_B" in name)[0, 0] = value
    safetensors.torch.save_file(weights, file)
    server = Server(weights={"broken": runs[0].adapter, BASE_NAME: None})
    with pytest.raises(InputError, match="does not answer with these weights"):
        require_weights_in_use(server, base_source(), "broken", "broken", folder, prompts)  # type: ignore[arg-type]


def test_a_whole_model_may_round_as_its_precision_does(
    runs: list[Run], prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server has no base, whose rounding could be measured."""
    run = runs[0]
    server = Server(weights={run.name: run.adapter}, noise=1e-3, whole=run.adapter)
    with pytest.raises(InputError, match="does not answer with these weights"):
        proof(server, run, prompts)
    monkeypatch.setattr(served_weights, "resolve_dtype", lambda source: "bfloat16")
    assert "rounding" not in proof(server, run, prompts)
    with pytest.raises(InputError, match=r"rounding hides|does not answer"):
        proof(Server(weights={run.name: None}, noise=1e-3, whole=run.adapter), run, prompts)


def test_a_server_without_log_probabilities_is_refused(runs: list[Run], prompts: list[tuple[int, ...]]) -> None:
    server = Server(weights={runs[0].name: runs[0].adapter, BASE_NAME: None})
    ask = server.ask

    def without(model: str, requests: Any, decoding: Any, keep: Any, description: str) -> None:
        ask(model, requests, decoding, lambda key, c: keep(key, replace(c, sampler_raw_logps=None)), description)

    server.ask = without
    with pytest.raises(InputError, match="returned no log-probabilities"):
        proof(server, runs[0], prompts)
