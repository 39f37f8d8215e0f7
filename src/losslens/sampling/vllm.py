"""A vLLM server of the user's own installation, which this process starts, uses and stops.

vLLM pins other versions of torch and transformers than LossLens, so it lives in an environment of its own, and is
started by a command. It listens on this machine only and answers requests with a key that no other user can read.
"""

from __future__ import annotations

import atexit
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from losslens.config.data import Server
from losslens.core.completions import Completion
from losslens.core.errors import InputError, ServerError, ServerStartError
from losslens.core.redaction import escape_control, remember_secret, remove_secrets
from losslens.models.limits import limits_of
from losslens.models.loading import ModelSource, load_config, load_tokenizer, locate, resolve_dtype
from losslens.models.tokens import chat_turns
from losslens.sampling.server import Decoding, Request, ask

BASE_NAME = "base"  # under which a server serves the model itself

_SUPERVISED = Path(__file__).with_name("supervised.py")
_KEY_VARIABLE = "LOSSLENS_VLLM_API_KEY"
# Of another environment, of a launcher of ours, or secret and none of its business; the hub's token it needs itself.
_NOT_INHERITED = re.compile(
    r"PYTHON.*|VIRTUAL_ENV|CONDA_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_.*|TORCHELASTIC_.*|SLURM_.*|PMI.*"
    r"|VLLM_PORT|WANDB_.*|OPENAI_.*|(?!HF_|HUGGING_FACE_).*(KEY|SECRET|TOKEN|PASSWORD)(_ID)?"
)
# What LossLens sets itself, or what would serve other weights than are asked for.
_RESERVED = {
    "host", "port", "uds", "model", "served-model-name", "api-key", "dtype", "revision", "tokenizer",
    "tokenizer-revision", "enable-lora", "max-lora-rank", "lora-modules", "generation-config", "root-path",
    "ssl-keyfile", "ssl-certfile", "config",
}  # fmt: skip
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that `--max-lora-rank` accepts
_LENGTH_STEP = 512  # lengths are rounded up to it, so that the next benchmark rarely needs another server
_CONCURRENCY = 256  # vLLM queues what it cannot batch yet
_TO_STOP = 30.0  # seconds that the server has to end once it is told to
_TO_END = 1.0  # seconds that a server takes to end after its first refusal
_FREE_SHARE = 0.9  # of the GPU memory that is free when the server starts


@dataclass(frozen=True)
class Needs:
    """Requirements of a server.

    Attributes:
        source: The model.
        tokens: Longest prompt with its answer, in tokens.
        lora_rank: Largest rank of the adapters to be loaded; 0 if there are none.
        weights: Folder of the model's weights where they are not those of `source` (full fine-tuning).
    """

    source: ModelSource
    tokens: int
    lora_rank: int = 0
    weights: Path | None = None

    @property
    def model(self) -> tuple[ModelSource, Path | None]:
        """The model, which a running server cannot change."""
        return self.source, self.weights


class VllmServer:
    """A running server.

    Attributes:
        section: The configuration section of its settings.
        needs: What it can serve.
        settings: Its address and key, and the limits of requests, as `server.ask` takes them.
        facts: Version, arguments and batch invariance, for metadata.
        log: Its log.
    """

    def __init__(self, section: str, settings: Server, needs: Needs, logs: Path) -> None:
        """Starts a server and waits until it answers.

        Args:
            section: The configuration section of `settings`, for messages.
            settings: Command, further arguments, and limits of the requests.
            needs: What it must be able to serve.
            logs: Folder for its log.

        Raises:
            InputError: The command does not exist.
            ServerStartError: The server ended or did not answer in time; the log says why.
        """
        self.section, self.needs, self.given = section, needs, settings
        self._adapters: dict[str, Path] = {}
        port = _free_port()
        command = _command(section, settings, needs, port)
        key = secrets.token_urlsafe(24)
        remember_secret(key)
        os.environ[_KEY_VARIABLE] = key
        self.settings = settings.model_copy(
            update={
                "base_url": f"http://127.0.0.1:{port}/v1", "api_key_env": _KEY_VARIABLE, "model": BASE_NAME,
                "concurrency": max(settings.concurrency, _CONCURRENCY),
            }
        )  # fmt: skip
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / f"{datetime.now(UTC):%Y%m%dT%H%M%S-%f}-{os.getpid()}.log"
        print(f"starting vLLM for {needs.source.path}; log: {self.log}", flush=True)
        with self.log.open("xb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_SUPERVISED), *command],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                env=_environment(key), start_new_session=True,
            )  # fmt: skip
        try:
            self._wait(settings.start_timeout)
        except BaseException:
            self.stop()
            raise
        self.facts: dict[str, Any] = {
            "engine": "vllm",
            "version": _field(self._request("/version")[1], "version"),
            "batch_invariant": is_batch_invariant(),
            "args": remove_secrets(shlex.join(command[1:])),
        }

    def serves(self, section: str, settings: Server, needs: Needs) -> bool:
        """Returns True if the server still runs, was started for these settings, and can serve what is needed."""
        own = self.needs
        return (
            self._process.poll() is None
            and (section, settings, needs.model) == (self.section, self.given, own.model)
            and needs.tokens <= own.tokens
            and needs.lora_rank <= own.lora_rank
        )

    def load_adapter(self, name: str, folder: Path) -> None:
        """Loads a PEFT adapter, to be asked for under `name`, unless that was done before.

        Raises:
            InputError: vLLM refuses the adapter.
        """
        if self._adapters.get(name) == folder:
            return
        if name in self._adapters:
            self._request("/v1/unload_lora_adapter", {"lora_name": name})
            del self._adapters[name]
        body = {"lora_name": name, "lora_path": str(folder.resolve())}
        status, answer = self._request("/v1/load_lora_adapter", body)
        if status != 200:
            why = _field(answer, "message") or " ".join(answer.split())
            raise InputError(
                f"{folder}: vLLM cannot serve this adapter ({escape_control(str(why)[:300])}); its log: {self.log}"
            )
        self._adapters[name] = folder

    def ask(
        self,
        model: str,
        requests: Mapping[str, Request],
        decoding: Decoding,
        keep: Callable[[str, Completion], None],
        description: str,
    ) -> None:
        """Asks as `server.ask` does; an error names the log."""
        try:
            ask(self.section, self.settings, model, requests, decoding, keep, description)
        except ServerError as error:
            time.sleep(_TO_END)
            if self._process.poll() is None:
                raise ServerError(f"{error} (log: {self.log})") from error
            raise ServerError(f"{self.section}: vLLM ended: {self._last_error()}") from error

    def stop(self) -> None:
        """Stops the server and everything that it has started."""
        os.environ.pop(_KEY_VARIABLE, None)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_TO_STOP)
        except subprocess.TimeoutExpired:  # another process holds the pipe open
            self._process.terminate()
            self._process.wait()

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with tqdm(desc="starting vLLM", unit="s", bar_format="{desc}: {elapsed}", leave=False) as bar:
            while True:
                if self._process.poll() is not None:
                    raise ServerStartError(f"{self.section}.command: the server ended: {self._last_error()}")
                if self._request("/health")[0] == 200:
                    return
                if time.monotonic() > end:
                    why = f"the server does not answer after {seconds:g} s ({self.section}.start_timeout)"
                    raise ServerStartError(f"{why}; its log: {self.log}")
                bar.update()
                time.sleep(0.5)

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """Returns status and text of the answer; status 0 if there is none."""
        request = urllib.request.Request(
            str(self.settings.base_url).removesuffix("/v1") + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {os.environ[_KEY_VARIABLE]}", "Content-Type": "application/json"},
        )
        # A proxy of the user's has no way to this machine's own addresses.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=self.settings.timeout) as answer:
                return answer.status, answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)

    def _last_error(self) -> str:
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        errors = [line for line in lines if re.search(r"\w*(Error|Exception)\b.*:|error:", line)]
        last = re.sub(r"^\(.*?\)\s*|^ERROR [\d: -]+\[.*?\]\s*", "", (errors or lines or ["it wrote nothing"])[-1])
        return f"{escape_control(last[:300])} (log: {self.log})"


_server: VllmServer | None = None


def vllm_server(section: str, settings: Server, needs: Needs, logs: Path) -> VllmServer:
    """Returns this process's server if it can serve what is needed; otherwise starts one in its place.

    Args:
        section: The configuration section of `settings`, for messages.
        settings: Command, arguments and limits.
        needs: What it must be able to serve.
        logs: Folder for its log.

    Raises:
        InputError: The command does not exist, or the model cannot be read.
        ServerStartError: The server does not start.
    """
    global _server
    if _server is not None and not _server.serves(section, settings, needs):
        needs = _widened(needs, _server.needs)
        stop_vllm()
    if _server is None:
        positions = limits_of(needs.source).positions
        tokens = -(-needs.tokens // _LENGTH_STEP) * _LENGTH_STEP
        tokens = tokens if positions is None else max(needs.tokens, min(tokens, positions))
        _server = VllmServer(section, settings, replace(needs, tokens=tokens), logs)
    return _server


def stop_vllm() -> None:
    """Stops this process's server, if there is one."""
    global _server
    if _server is not None:
        _server.stop()
        _server = None


def free_gpu() -> None:
    """Stops this process's server if it holds memory of a GPU, which training needs."""
    import torch

    if _server is not None and _server.needs.source.device != "cpu" and torch.cuda.is_available():
        stop_vllm()


atexit.register(stop_vllm)


def neutral_fields(source: ModelSource) -> dict[str, Any]:
    """Returns the fields of a request with which vLLM samples and ends answers as `sampling.local` does."""
    from transformers import GenerationConfig

    path, commit = locate(source)
    try:
        declared = GenerationConfig.from_pretrained(path, revision=commit).eos_token_id
    except OSError:  # a model need not have one
        declared = load_config(source).get_text_config().eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    ends = sorted({*chat_turns(load_tokenizer(source)).ends, *declared})
    return {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "stop_token_ids": ends, "skip_special_tokens": False}


def is_batch_invariant() -> bool:
    """Returns True if vLLM is told to compute the same numbers whatever else is in a batch."""
    return os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")


def require_command(section: str, settings: Server) -> list[str]:
    """Returns the words of the command that starts vLLM.

    Raises:
        InputError: It is not a command, or its program does not exist.
    """
    try:
        words = shlex.split(settings.command)
    except ValueError as error:
        raise InputError(f"{section}.command={settings.command}: {error}") from error
    if words:
        words[0] = str(Path(words[0]).expanduser())
    if not words or shutil.which(words[0]) is None:
        raise InputError(
            f"{section}.command={settings.command}: no such program; install vLLM in an environment of its own, and "
            f"set {section}.command='/path/to/that/bin/vllm serve'"
        )
    return words


def _command(section: str, settings: Server, needs: Needs, port: int) -> list[str]:
    source = needs.source
    path, commit = locate(source)
    words = require_command(section, settings)
    served = path if needs.weights is None else str(needs.weights)
    words += [served] if words[-1] == "serve" else ["--model", served]
    options: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": BASE_NAME,
        "dtype": resolve_dtype(source),
        "max-model-len": needs.tokens,
        # Otherwise defaults for sampling come from the model's folder.
        "generation-config": "vllm",
    }
    if needs.weights is not None:
        options |= {"tokenizer": path, "tokenizer-revision": commit}
    elif commit:
        options |= {"revision": commit, "tokenizer-revision": commit}
    if source.trust_remote_code:
        options["trust-remote-code"] = True
    if needs.lora_rank:
        rank = next((rank for rank in _RANKS if rank >= needs.lora_rank), None)
        if rank is None:
            raise InputError(f"{section}: vLLM serves adapters up to rank {_RANKS[-1]}, not {needs.lora_rank}")
        options |= {"enable-lora": True, "max-lora-rank": rank}
    if (share := _free_memory(source)) is not None:
        options["gpu-memory-utilization"] = share
    else:
        # A prompt in parts that is sampled with a seed ends vLLM 0.32 on the CPU.
        options["enable-chunked-prefill"] = False
    given = {name.lstrip("-").replace("_", "-"): value for name, value in (settings.args or {}).items()}
    if taken := sorted(_RESERVED & given.keys()):
        raise InputError(f"{section}.args: LossLens sets {', '.join(taken)} itself")
    options |= given
    return [*words, *(word for name, value in options.items() for word in _option(name, value))]


def _option(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]


def _free_memory(source: ModelSource) -> float | None:
    """Returns the share of the GPU's memory that the server may use beside this process; None without CUDA."""
    import torch

    if source.device == "cpu" or not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return round(_FREE_SHARE * free / total, 2)


def _environment(key: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.fullmatch(name)}
    own = {"VLLM_API_KEY": key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {**inherited, **own}


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _widened(needs: Needs, earlier: Needs) -> Needs:
    """Returns the needs of both if the model is the same, so that two benchmarks do not replace each other's server."""
    if needs.model != earlier.model:
        return needs
    wider = max(needs.tokens, earlier.tokens), max(needs.lora_rank, earlier.lora_rank)
    return replace(needs, tokens=wider[0], lora_rank=wider[1])


def _field(text: str, name: str) -> Any:
    """Returns a field of a JSON object, or of the object `error` in it; None if there is no such field."""
    try:
        body = json.loads(text)
    except ValueError:
        return None
    if not isinstance(body, dict):
        return None
    nested = body.get("error")
    return body.get(name) or (nested.get(name) if isinstance(nested, dict) else None)
