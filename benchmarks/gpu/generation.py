"""Tokens per second of generation, by the engines at hand: transformers, and the user's own vLLM."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.full_size import ROOT, saved
from benchmarks.gpu.setting import Setting, synchronise
from losslens.config.data import Server
from losslens.core.completions import Completion
from losslens.core.errors import InputError, ServerError, first_line
from losslens.models.loading import LoadedModel, ModelSource
from losslens.models.tokens import encode_prompt
from losslens.sampling.local import generate_samples
from losslens.sampling.server import Decoding, Request
from losslens.sampling.vllm import BASE_NAME, Needs, VllmServer, neutral_fields, require_command


def with_transformers(setting: Setting, base: LoadedModel) -> dict[str, Any]:
    """Samples with transformers, as `engine=transformers` does, after a few tokens that do not count."""
    tokens, rows = setting.new_tokens
    options: dict[str, Any] = {"samples": 1, "temperature": 1.0, "top_p": 1.0, "batch_size": rows, "seed": 0}
    generate_samples(base.model, base.tokenizer, _prompts(rows), max_new_tokens=4, **options)
    synchronise(setting)
    started = time.perf_counter()
    made = generate_samples(base.model, base.tokenizer, _prompts(rows), max_new_tokens=tokens, **options)
    synchronise(setting)
    return _result("transformers", sum(each.tokens for [each] in made), time.perf_counter() - started, rows)


def with_vllm(setting: Setting, base: LoadedModel, command: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Samples with a vLLM server as `engine=vllm` does, or says why it cannot.

    Args:
        setting: Device and sizes.
        base: The model, which is saved for the server.
        command: The command that starts the server.
        seconds: Time within which it must answer.
        folder: Folder for the model and the server's log.
    """
    given = yaml.safe_load((ROOT / "conf" / "server" / "openai.yaml").read_text(encoding="utf-8"))
    settings = Server(**{**given, "command": command, "start_timeout": max(seconds, 1.0)})
    tokens, rows = setting.new_tokens
    server = None
    try:
        require_command("vllm", settings)
        path = str(saved(base.model, folder / "model"))
        dtype = str(setting.dtype).removeprefix("torch.")
        source = ModelSource("model", path, None, dtype, setting.device, trust_remote_code=False)
        encoded = [tuple(encode_prompt(base.tokenizer, prompt)) for prompt in _prompts(rows)]
        server = VllmServer("vllm", settings, Needs(source, max(map(len, encoded)) + tokens), folder / "logs")
        requests = {str(i): Request(p, i, e) for i, (p, e) in enumerate(zip(_prompts(rows), encoded, strict=True))}
        made: dict[str, Completion] = {}
        few = Decoding(1.0, 1.0, 4, neutral_fields(source))
        server.ask(BASE_NAME, {"0": requests["0"]}, few, made.__setitem__, "vllm")
        started = time.perf_counter()
        server.ask(BASE_NAME, requests, Decoding(1.0, 1.0, tokens, few.extra_body), made.__setitem__, "vllm")
        elapsed = time.perf_counter() - started
    except (InputError, ServerError, OSError) as error:
        # Its log goes with the folder.
        return _result("vllm", 0, 0.0, rows, re.split(r" \(log: |; its log: ", first_line(error))[0])
    finally:
        if server is not None:
            server.stop()
    return _result("vllm", sum(each.tokens or 0 for each in made.values()), elapsed, rows)


def _prompts(rows: int) -> list[str]:
    return [f"{number} + {number + 1} =" for number in range(rows)]


def _result(engine: str, tokens: int, seconds: float, rows: int, note: str = "") -> dict[str, Any]:
    rate = tokens / seconds if seconds else None
    return {"engine": engine, "tokens_per_second": rate, "note": note or f"{rows} sequences at once"}
