"""Completions from an OpenAI-compatible server (vLLM, SGLang, `transformers serve`, a vendor): asked once each."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from losslens.config.data import Server
from losslens.core.completions import Completion
from losslens.core.errors import InputError, ServerError, first_line
from losslens.core.redaction import (
    escape_control,
    public_address,
    remember_address,
    remember_secret,
    without_key,
    without_secrets,
)

_LONGEST_PAUSE = 60.0  # seconds between two attempts, unless the server names a time
_LONGEST_WAIT = 600.0  # seconds, whatever the server names
_MOST_TOKENS = 10**9  # of one answer, or its prompt; what says more does not count


@dataclass(frozen=True)
class Request:
    """One question to the server.

    Attributes:
        prompt: The user's turn; the server puts its chat template around it.
        seed: For sampling; None for greedy decoding.
    """

    prompt: str
    seed: int | None


@dataclass(frozen=True)
class Decoding:
    """How completions are decoded.

    Attributes:
        temperature: 0 is greedy.
        top_p: Share of the probability mass that is sampled from.
        max_tokens: Where a completion is cut.
        extra_body: Further fields of the request.
    """

    temperature: float
    top_p: float
    max_tokens: int
    extra_body: Mapping[str, Any] = field(default_factory=dict)


def ask(
    section: str,
    server: Server,
    model: str,
    requests: Mapping[str, Request],
    decoding: Decoding,
    keep: Callable[[str, Completion], None],
    description: str,
) -> None:
    """Asks all `requests`, several at once, and hands each answer to `keep` as it arrives.

    Requests that fail in a way that may pass (429, 5xx, no connection, an answer that is none) are tried again with
    growing pauses, or when the server says. If one fails for good, or at the first Ctrl-C, those that are under way are
    waited for and kept.

    Args:
        section: The configuration section of the server, for messages.
        server: Where and how fast.
        model: The model's name there.
        requests: By key.
        decoding: Temperature, limits, further fields.
        keep: Called once for each request that is answered.
        description: Of the progress bar.

    Raises:
        InputError: No address is given, or no key.
        ServerError: A request failed for good; all that was answered was handed to `keep`.
    """
    if not requests:
        return
    base_url = address(server)
    key = os.environ.get(server.api_key_env)
    # Whatever the server, or the library that asks it, says of them.
    remember_secret(key)
    remember_address(base_url)
    if base_url is None and key is None:
        raise InputError(
            f"{section}.base_url: give the server's address, or the key in the environment ({server.api_key_env})"
        )
    failure = asyncio.run(_Asking(server, model, decoding, keep, key).all(requests, base_url, description))
    if isinstance(failure, ServerError):
        where = f"{model} at {public_address(base_url) or 'OpenAI'}"
        raise ServerError(without_secrets(f"{section}: {where}: {failure}")) from failure.__cause__
    if failure is not None:
        raise failure


@dataclass(eq=False)
class _Asking:
    """One round of requests: who asks, and what stopped them."""

    server: Server
    model: str
    decoding: Decoding
    keep: Callable[[str, Completion], None]
    key: str | None
    failure: BaseException | None = None
    told: bool = False

    def __post_init__(self) -> None:
        from aiolimiter import AsyncLimiter

        pace = self.server.requests_per_minute
        self.limiter = AsyncLimiter(1, 60 / pace) if pace else None
        self.stopped = asyncio.Event()
        self.asks_ids = self.server.token_ids == "auto"

    async def all(
        self, requests: Mapping[str, Request], base_url: str | None, description: str
    ) -> BaseException | None:
        """Asks them all; what stopped it, or None."""
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
                except Exception as error:  # told by `ask`, once the others' answers are kept
                    self._stop(error)

        # Its own retries know nothing of an answer that is none.
        options: dict[str, Any] = {"base_url": base_url, "api_key": self.key or "none", "timeout": self.server.timeout}
        self._catch_interrupt()
        try:
            async with AsyncOpenAI(**options, max_retries=0) as client:
                workers = range(min(self.server.concurrency, len(requests)))
                await asyncio.gather(*(worker(client) for _ in workers))
        finally:
            bar.close()
        return self.failure

    def _stop(self, why: BaseException) -> None:
        self.failure = self.failure or why
        self.stopped.set()

    def _catch_interrupt(self) -> None:
        loop = asyncio.get_running_loop()

        def interrupted() -> None:
            tqdm.write("waiting for the answers that are under way; Ctrl-C again drops them")
            self._stop(KeyboardInterrupt())
            loop.remove_signal_handler(signal.SIGINT)

        with suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
            loop.add_signal_handler(signal.SIGINT, interrupted)

    async def _one(self, client: Any, request: Request) -> Completion | None:
        """One answer, after as many attempts as are allowed; None when it was stopped meanwhile."""
        from openai import omit

        # A field that `extra_body` names is its own to give, or as null to leave out: not every server takes every one.
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
        for attempt in range(1, self.server.attempts + 1):
            if self.limiter is not None:
                await self.limiter.acquire()
            if self.stopped.is_set():
                return None
            try:
                return _completion(
                    await client.chat.completions.create(
                        model=self.model,
                        messages=[{"role": "user", "content": request.prompt}],
                        **fields,
                        extra_body={**extra, **({"return_token_ids": True} if asks_ids else {})} or None,
                    ),
                    self.key,
                )
            except Exception as error:
                if asks_ids and getattr(error, "status_code", None) in (400, 422):
                    # A server that refuses what it does not know, unless it refuses the question itself.
                    self.asks_ids = False
                    return await self._one(client, request)
                wait = _wait(error, attempt)
                if wait is None:
                    raise ServerError(f"{_told(error)} (the prompt begins {request.prompt[:40]!r})") from error
                if attempt == self.server.attempts:
                    raise ServerError(f"no answer in {attempt} attempts; the last one: {_told(error)}") from error
                if not self.told or wait > _LONGEST_PAUSE:
                    self.told = True
                    tqdm.write(
                        f"{escape_control(_told(error))}; attempt {attempt + 1} of {self.server.attempts} in {wait:g} s"
                    )
            try:
                await asyncio.wait_for(self.stopped.wait(), wait)
            except TimeoutError:
                continue
        return None


class _NoAnswerError(Exception):
    """The server answered, but not with a completion."""


def _completion(answer: Any, key: str | None) -> Completion:
    """The completion in an answer to a request with `key`.

    Raises:
        _NoAnswerError: There is none in it.
    """
    try:
        choice = answer.choices[0]
        text, cut = choice.message.content, choice.finish_reason != "stop"
        # Where a server parts a model's reasoning from its answer; a model is distilled from both.
        reasoning = getattr(choice.message, "reasoning_content", None) or getattr(choice.message, "reasoning", None)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise _NoAnswerError(f"an answer without a completion: {without_secrets(str(answer))[:80]!r}") from error
    for part in (text, reasoning):
        if not isinstance(part, (str, type(None))):
            raise _NoAnswerError(f"an answer whose text is none: {without_secrets(str(part))[:80]!r}")
    text = text or ""
    usage = getattr(answer, "usage", None)
    tokens, prompt_tokens = (_count(getattr(usage, name, None)) for name in ("completion_tokens", "prompt_tokens"))
    if not (text or reasoning or tokens):
        raise _NoAnswerError("an empty answer")
    if reasoning:
        text = f"<think>\n{reasoning}" if cut and not text else f"<think>\n{reasoning}\n</think>\n\n{text}"
    # Half of a surrogate pair is no text, and nothing could keep it. What is kept is data: the same on every machine,
    # whatever its environment holds; only the request's own key, should the server repeat it, is not the model's.
    kept = without_key(text.encode("utf-8", "replace").decode("utf-8"), key)
    ids, prompt_ids = (
        _token_ids(getattr(holder, name, None))
        for holder, name in ((choice, "token_ids"), (answer, "prompt_token_ids"))
    )
    if kept != text or ids is None:  # the ids would tell the key again
        ids = prompt_ids = None
    return Completion(kept, tokens, not cut, prompt_tokens, ids, prompt_ids)


def _token_ids(value: Any) -> tuple[int, ...] | None:
    """Token ids as vLLM gives them (`return_token_ids`); None where there are none, or something else."""
    if not isinstance(value, list) or not all(type(id_) is int and 0 <= id_ < 2**31 for id_ in value):
        return None
    return tuple(value)


def _count(value: Any) -> int | None:
    """A number of tokens as a server gives it; None, not known, where it is no such number."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= _MOST_TOKENS else None


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds until the next attempt; None when another one would not help."""
    from openai import APIStatusError

    pause = min(_LONGEST_PAUSE, 0.5 * 2 ** (attempt - 1))
    if not isinstance(error, APIStatusError):
        # No connection, or a body that the client cannot make sense of: any kind of error, by what is wrong with it.
        return pause
    spent = getattr(error, "code", None) == "insufficient_quota"
    if spent or not (error.status_code in (408, 409, 429) or error.status_code >= 500):
        return None
    try:
        return min(_LONGEST_WAIT, max(pause, float(error.response.headers.get("retry-after", 0))))
    except ValueError:  # a date
        return _LONGEST_PAUSE


def _told(error: Exception) -> str:
    """What happened, in one line, with what the server said of it."""
    from openai import APIStatusError

    # Redacted before it is cut: half a key is one too.
    cause = f" ({without_secrets(first_line(error.__cause__))[:200]})" if error.__cause__ is not None else ""
    said = ""
    if isinstance(error, APIStatusError):
        text = without_secrets(" ".join(error.response.text.split()))[:200]
        said = f": {text}" if text and text not in str(error) and str(error).count("{") == 0 else ""
    return f"{without_secrets(first_line(error))[:200]}{said}{cause}"


def address(server: Server) -> str | None:
    """Where the server is; None is OpenAI."""
    return server.base_url or os.environ.get("OPENAI_BASE_URL")


def cost(server: Server, prompt_tokens: int, completion_tokens: int) -> float | None:
    """What so many tokens cost at the prices given (a million tokens each); None when none are."""
    if server.price_prompt is None or server.price_completion is None:
        return None
    return (prompt_tokens * server.price_prompt + completion_tokens * server.price_completion) / 1e6
