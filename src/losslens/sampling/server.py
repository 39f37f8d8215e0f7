"""Completions from an OpenAI-compatible server (vLLM, SGLang, `transformers serve`, a vendor), each requested once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from losslens.config.data import Server
from losslens.core import preemption
from losslens.core.completions import Completion
from losslens.core.errors import InputError, ServerError, first_line
from losslens.core.redaction import (
    escape_control,
    public_address,
    remember_address,
    remember_secret,
    remove_key,
    remove_secrets,
)

_MAX_BACKOFF = 60.0  # seconds between two attempts, unless the server sends Retry-After
_MAX_RETRY_AFTER = 600.0  # seconds, even if the server asks for more
_MAX_TOKENS = 10**9  # of a completion or prompt; larger counts are considered invalid
_NO_LOGPROB = -9999.0  # what OpenAI and vLLM send in place of a log-probability that they do not have
_CHECK_SECONDS = 0.1  # between two looks at whether a scheduler has asked to stop
_GRACE = 10.0  # seconds for pending completions once it has; Slurm kills 30 s after SIGTERM by default
_LOGPROB_ROUNDING = 1e-4  # nats by which a log-probability may exceed 0
# Fields of a request that leave the distribution of the next token as the model computes it: of these any value, of
# those below the ones listed. Any other field may change it.
_UNRELATED_FIELDS = {
    "chat_template", "chat_template_kwargs", "include_reasoning", "logprobs", "max_completion_tokens", "max_tokens",
    "reasoning_effort", "return_token_ids", "seed", "separate_reasoning", "skip_special_tokens", "stop",
    "stop_token_ids", "top_logprobs", "user",
}  # fmt: skip
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "temperature": (1,), "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "presence_penalty": (0,),
    "frequency_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},),
}  # fmt: skip
# Fields for which vLLM takes the value of the model's `generation_config.json` if a request leaves them out.
_DEFAULT_OF_MODEL = ("top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Request:
    """A request for one completion.

    Attributes:
        prompt: The user turn, to which the server applies its chat template.
        seed: Seed for sampling; None for greedy decoding.
        prompt_ids: Token ids of the rendered prompt, which are sent instead of `prompt` if given (vLLM takes them).
    """

    prompt: str
    seed: int | None
    prompt_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Decoding:
    """Decoding parameters of a request.

    Attributes:
        temperature: Softmax temperature; 0 is greedy.
        top_p: Probability mass of nucleus sampling.
        max_tokens: Maximum length of a completion.
        extra_body: Additional fields of the request.
        logps: Ask for the log-probabilities of the sampled tokens, if the server also returns token ids.
    """

    temperature: float
    top_p: float
    max_tokens: int
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    logps: bool = False

    @property
    def is_raw(self) -> bool:
        """True if the request says that tokens are sampled at temperature 1 and without truncation.

        What it leaves to the server's defaults may truncate.
        """
        fields = {"temperature": self.temperature, "top_p": self.top_p, **self.extra_body}
        return fields.keys() >= set(_DEFAULT_OF_MODEL) and all(
            name in _UNRELATED_FIELDS or value in _NEUTRAL_VALUES.get(name, ()) for name, value in fields.items()
        )


def ask(
    section: str,
    server: Server,
    model: str,
    requests: Mapping[str, Request],
    decoding: Decoding,
    keep: Callable[[str, Completion], None],
    description: str,
) -> None:
    """Sends all `requests` concurrently and passes each completion to `keep` as it arrives.

    Transient failures (429, 5xx, no connection, an invalid response) are retried with exponential backoff, or when the
    server says. After a permanent failure or the first Ctrl-C, pending requests are still awaited and their completions
    kept; after a scheduler's signal, for up to 10 s.

    Args:
        section: The configuration section of the server, for messages.
        server: Address, concurrency, and limits.
        model: The server's name for the model.
        requests: Requests by key.
        decoding: Decoding parameters.
        keep: Called with key and completion, once per completed request.
        description: Label of the progress bar.

    Raises:
        InputError: Neither an address nor a key is given.
        ServerError: A request failed permanently; all completions received were passed to `keep`.
        Preempted: A scheduler's signal was received; likewise.
    """
    if not requests:
        return
    base_url = address(server)
    key = os.environ.get(server.api_key_env)
    # The server or the client library may repeat them in messages.
    remember_secret(key)
    remember_address(base_url)
    if base_url is None and key is None:
        raise InputError(
            f"{section}.base_url: set the server's address, or the key in the environment ({server.api_key_env})"
        )
    with preemption.deferred():  # an event loop discards what a signal handler raises within one of its callbacks
        failure = asyncio.run(_Requests(server, model, decoding, keep, key).all(requests, base_url, description))
    if isinstance(failure, ServerError):
        where = f"{model} at {public_address(base_url) or 'OpenAI'}"
        raise ServerError(remove_secrets(f"{section}: {where}: {failure}")) from failure.__cause__
    if failure is not None:
        raise failure


@dataclass(eq=False)
class _Requests:
    """A set of concurrent requests, and the failure that stopped them."""

    server: Server
    model: str
    decoding: Decoding
    keep: Callable[[str, Completion], None]
    key: str | None
    failure: BaseException | None = None
    reported: bool = False

    def __post_init__(self) -> None:
        from aiolimiter import AsyncLimiter

        pace = self.server.requests_per_minute
        self.limiter = AsyncLimiter(1, 60 / pace) if pace else None
        self.stopped = asyncio.Event()
        self.asks_ids = self.server.token_ids == "auto"
        self.asks_logps = self.decoding.logps

    async def all(
        self, requests: Mapping[str, Request], base_url: str | None, description: str
    ) -> BaseException | None:
        """Sends all requests; returns the failure that stopped them, or None."""
        from openai import AsyncOpenAI

        waiting = iter(requests.items())
        bar = tqdm(total=len(requests), desc=description, unit="answer", leave=False, dynamic_ncols=True)

        async def worker(client: AsyncOpenAI) -> None:
            for name, request in waiting:
                if self.stopped.is_set():
                    return
                try:
                    completion = await self._one(client, request)
                    if completion is not None:
                        self.keep(name, completion)
                        bar.update()
                except Exception as error:  # raised by `ask` once the pending completions are kept
                    self._stop(error)

        # The client's own retries do not cover invalid responses.
        options: dict[str, Any] = {"base_url": base_url, "api_key": self.key or "none", "timeout": self.server.timeout}
        self._catch_interrupt()
        try:
            async with AsyncOpenAI(**options, max_retries=0) as client:
                count = min(self.server.concurrency, len(requests))
                workers = asyncio.gather(*(worker(client) for _ in range(count)))
                watch = asyncio.create_task(self._stop_when_preempted(workers))
                try:
                    await workers
                except asyncio.CancelledError:
                    if not preemption.is_requested():
                        raise
                finally:
                    watch.cancel()
        finally:
            bar.close()
        return self.failure

    async def _stop_when_preempted(self, workers: asyncio.Future[Any]) -> None:
        while not preemption.is_requested():
            await asyncio.sleep(_CHECK_SECONDS)
        tqdm.write("stopping; waiting for pending completions")
        self.stopped.set()
        await asyncio.sleep(_GRACE)
        workers.cancel()

    def _stop(self, why: BaseException) -> None:
        self.failure = self.failure or why
        self.stopped.set()

    def _catch_interrupt(self) -> None:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a local worker: Ctrl-C is for its parent
            return
        loop = asyncio.get_running_loop()

        def interrupted() -> None:
            tqdm.write("waiting for pending completions; press Ctrl-C again to discard them")
            self._stop(KeyboardInterrupt())
            loop.remove_signal_handler(signal.SIGINT)

        with suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
            loop.add_signal_handler(signal.SIGINT, interrupted)

    async def _one(self, client: Any, request: Request) -> Completion | None:
        """Requests one completion, with retries; returns None if stopped meanwhile."""
        from openai import omit

        # `extra_body` takes precedence and omits a field with null, since not every server accepts every field.
        body = self.decoding.extra_body
        fields: dict[str, Any] = {
            "temperature": self.decoding.temperature,
            "top_p": self.decoding.top_p,
            "max_tokens": omit if "max_completion_tokens" in body else self.decoding.max_tokens,
            "seed": request.seed,
        }
        fields = {name: omit if name in body else value for name, value in fields.items()}
        extra = {name: value for name, value in body.items() if value is not None}
        asks_ids = self.asks_ids and "return_token_ids" not in body
        # Without token ids they would belong to unknown tokens.
        asks_logps = self.asks_logps and asks_ids and "logprobs" not in body
        extra |= {"return_token_ids": True} if asks_ids else {}
        # The endpoint for token ids wants the number of alternatives.
        extra |= {"logprobs": True if request.prompt_ids is None else 1} if asks_logps else {}
        for attempt in range(1, self.server.attempts + 1):
            if self.limiter is not None:
                await self.limiter.acquire()
            if self.stopped.is_set():
                return None
            try:
                if request.prompt_ids is None:
                    create = client.chat.completions.create
                    content: dict[str, Any] = {"messages": [{"role": "user", "content": request.prompt}]}
                else:
                    create, content = client.completions.create, {"prompt": list(request.prompt_ids)}
                answer = await create(model=self.model, **content, **fields, extra_body=extra or None)
                completion = _completion(answer, self.key)
                # Servers report the model's own distribution (vLLM's default logprobs_mode, raw_logprobs).
                raw = completion.sampler_raw_logps if self.decoding.is_raw else None
                return replace(completion, sampler_logps=raw)
            except Exception as error:
                if asks_ids and getattr(error, "status_code", None) in (400, 422):
                    # The server may reject unknown fields; if it rejects the request itself, it will do so again.
                    if asks_logps:
                        self.asks_logps = False
                    else:
                        self.asks_ids = False
                    return await self._one(client, request)
                wait = _wait(error, attempt)
                if wait is None:
                    raise ServerError(f"{_describe(error)} (the prompt begins {request.prompt[:40]!r})") from error
                if attempt == self.server.attempts:
                    raise ServerError(f"no answer in {attempt} attempts; last error: {_describe(error)}") from error
                if not self.reported or wait > _MAX_BACKOFF:
                    self.reported = True
                    next_attempt = f"attempt {attempt + 1} of {self.server.attempts} in {wait:g} s"
                    tqdm.write(f"{escape_control(_describe(error))}; {next_attempt}")
            try:
                await asyncio.wait_for(self.stopped.wait(), wait)
            except TimeoutError:
                continue
        return None


class _InvalidResponseError(Exception):
    """The server's response contains no completion."""


def _completion(response: Any, key: str | None) -> Completion:
    """Extracts the completion from the response to a request that was sent with `key`.

    Raises:
        _InvalidResponseError: The response contains no completion.
    """
    try:
        choice = response.choices[0]
        truncated = choice.finish_reason != "stop"
        message = getattr(choice, "message", None)
        text = choice.text if message is None else message.content
        # Some servers return a model's reasoning separately; rollouts contain both.
        reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise _InvalidResponseError(f"no completion in the response {remove_secrets(str(response))[:80]!r}") from error
    for part in (text, reasoning):
        if not isinstance(part, (str, type(None))):
            raise _InvalidResponseError(f"the completion is not a string: {remove_secrets(str(part))[:80]!r}")
    text = text or ""
    usage = getattr(response, "usage", None)
    tokens, prompt_tokens = (_count(getattr(usage, name, None)) for name in ("completion_tokens", "prompt_tokens"))
    if not (text or reasoning or tokens):
        raise _InvalidResponseError("an empty completion")
    if reasoning:
        text = f"<think>\n{reasoning}" if truncated and not text else f"<think>\n{reasoning}\n</think>\n\n{text}"
    # Lone surrogates cannot be stored. Otherwise the text is kept as it is, since data must not depend on the machine's
    # environment; only the request's own key is removed, if the server repeats it.
    kept = remove_key(text.encode("utf-8", "replace").decode("utf-8"), key)
    ids, prompt_ids = (
        next(filter(None, (_token_ids(getattr(holder, name, None)) for holder in (choice, response))), None)
        for name in ("token_ids", "prompt_token_ids")
    )
    if kept != text or ids is None:  # the ids would reveal the key
        ids = prompt_ids = None
    logps = _logps(getattr(choice, "logprobs", None))
    if ids is None or logps is None or len(logps) != len(ids):
        logps = None
    return Completion(kept, tokens, not truncated, prompt_tokens, ids, prompt_ids, sampler_raw_logps=logps)


def _token_ids(value: Any) -> tuple[int, ...] | None:
    """Returns token ids as sent by vLLM (`return_token_ids`); None if missing or invalid."""
    if not isinstance(value, list) or not all(type(id_) is int and 0 <= id_ < 2**31 for id_ in value):
        return None
    return tuple(value)


def _logps(logprobs: Any) -> tuple[float, ...] | None:
    """Returns the log-probabilities of the sampled tokens, at most 0; None if any is missing or invalid."""
    content, values = getattr(logprobs, "content", None), getattr(logprobs, "token_logprobs", None)
    if isinstance(content, list):
        values = [getattr(token, "logprob", None) for token in content]
    if not isinstance(values, list):
        return None
    if not all(type(v) in (int, float) and _NO_LOGPROB < v <= _LOGPROB_ROUNDING for v in values):
        return None
    return tuple(min(float(value), 0.0) for value in values)


def _count(value: Any) -> int | None:
    """Returns a number of tokens sent by a server; None if missing or invalid."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= _MAX_TOKENS else None


def _wait(error: Exception, attempt: int) -> float | None:
    """Returns the seconds until the next attempt; None if the failure is permanent."""
    from openai import APIStatusError

    pause = min(_MAX_BACKOFF, 0.5 * 2.0 ** (attempt - 1))
    if not isinstance(error, APIStatusError):
        # No connection, or a response that the client cannot parse, which can raise any kind of error.
        return pause
    out_of_quota = getattr(error, "code", None) == "insufficient_quota"
    if out_of_quota or not (error.status_code in (408, 409, 429) or error.status_code >= 500):
        return None
    try:
        return min(_MAX_RETRY_AFTER, max(pause, float(error.response.headers.get("retry-after", 0))))
    except ValueError:  # a date
        return _MAX_BACKOFF


def _describe(error: Exception) -> str:
    """Describes an error in one line, with the server's message."""
    from openai import APIStatusError

    # Redacted before truncation: part of a key is still a secret.
    cause = f" ({remove_secrets(first_line(error.__cause__))[:200]})" if error.__cause__ is not None else ""
    body = ""
    if isinstance(error, APIStatusError):
        text = remove_secrets(" ".join(error.response.text.split()))[:200]
        body = f": {text}" if text and text not in str(error) and str(error).count("{") == 0 else ""
    return f"{remove_secrets(first_line(error))[:200]}{body}{cause}"


def address(server: Server) -> str | None:
    """Returns the address of the server; None for OpenAI."""
    return server.base_url or os.environ.get("OPENAI_BASE_URL")


def cost(server: Server, prompt_tokens: int, completion_tokens: int) -> float | None:
    """Computes the cost of a number of tokens from the prices per million tokens; None if no prices are given."""
    if server.price_prompt is None or server.price_completion is None:
        return None
    return (prompt_tokens * server.price_prompt + completion_tokens * server.price_completion) / 1e6
