"""The base model and its tokenizer: where they come from, how they are loaded, and lending the base."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from losslens.config.model import Model
from losslens.core import distributed, hub
from losslens.core.commands import called
from losslens.core.errors import InputError, UnavailableError, first_line
from losslens.core.hashing import hash_folder
from losslens.core.notices import say_once
from losslens.models import gguf_package
from losslens.models.tokens import chat_turns, declare_ends

# torch, transformers and peft are imported where they are needed: a sweep that is finished must not wait for them.

_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
# `SafetensorError`, which says of a damaged file that it is one, is an `Exception` and no more.
_LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, SafetensorError)

_CLOCK_NAME = "strftime_now"  # what transformers calls it in chat templates
_CLOCK_CODES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAwdbBmyYHIpMSfzZjUWcxXGuVDFTReklhCg"]
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from.

    Attributes:
        field: The configuration field that names it, for error messages.
        path: A local folder or a hub id.
        revision: Commit, tag or branch of a hub id.
        dtype: Precision of the weights; `auto` is float32 on the CPU and bfloat16 on CUDA.
        device: A torch device; `auto` is CUDA where there is one.
        trust_remote_code: Whether code that comes with the model may run.
        attention: The attention implementation; `auto` is what transformers chooses: `sdpa`, where the model has it.
        package: A Python package that ships this very model; taken when the hub cannot be reached.
        chat_options: Variables of the chat template as JSON, for example `{"enable_thinking": false}`; `strftime_now`
            is the date that a template is told.
    """

    field: str
    path: str
    revision: str | None
    dtype: str
    device: str
    trust_remote_code: bool
    attention: str = "auto"
    package: str | None = None
    chat_options: str = "{}"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its tokenizer."""

    model: Any
    tokenizer: Any


def source_of(model: Model, teacher: bool = False) -> ModelSource:
    """Where the base, or the teacher, of a configuration is loaded from."""
    if teacher:
        field, path, revision, package = "model.teacher", str(model.teacher), model.teacher_revision, None
    else:
        field, path, revision = "model.path", model.path, model.revision
        package = model.package.name if model.package and model.package.of == path else None
    return ModelSource(
        field=field,
        path=path,
        revision=revision,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
        attention=model.attention,
        package=package,
        chat_options=json.dumps(model.chat_options or {}, sort_keys=True),
    )


@lru_cache(maxsize=16)
def locate(source: ModelSource) -> tuple[str, str | None]:
    """Where a model is loaded from: a folder, or a hub id and its commit.

    Raises:
        InputError: `path` is neither a folder with a model in it nor a hub id that can be loaded.
    """
    folder = Path(source.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{source.field}={source.path}: no config.json in this folder")
        return str(folder), None
    if not hub.is_hub_id(source.path) or ("/" in source.path and Path(source.path).parent.is_dir()):
        raise InputError(f"{source.field}={source.path}: no such folder")
    if source.package is None or hub.is_available(source.field, source.path, source.revision):
        return source.path, hub.resolve_commit(source.field, source.path, source.revision)
    try:
        folder = gguf_package.converted(source.package)
    except UnavailableError as error:
        raise InputError(f"{source.field}={source.path}: the hub cannot be reached, and {error}") from error
    print(f"{source.path}: the hub cannot be reached; taking the weights in the package {source.package}", flush=True)
    return str(folder), None


@lru_cache(maxsize=16)
def model_identity(source: ModelSource) -> dict[str, str | None]:
    """What tells a model from another, wherever it lies: the content of a folder, or a hub id and its commit.

    A packaged model is known by its GGUF file. It is not the model of the hub: its weights were quantised.

    Raises:
        InputError: As for `locate`.
    """
    path, commit = locate(source)
    if commit is not None:
        return {"hub_id": path, "revision": commit}
    if path != str(Path(source.path).expanduser()):
        assert source.package is not None
        return gguf_package.identity(source.package)
    return {"sha256": hash_folder(Path(path), _MODEL_FILES)}


# The moment that chat templates are told when they ask for the time: the day that Llama's take where there is no clock.
# A prompt must not change from one day to the next: the same run would be trained on another one.
CLOCK = datetime(2024, 7, 26)


@lru_cache(maxsize=16)
def load_config(source: ModelSource) -> Any:
    """Loads the configuration of a model.

    Raises:
        InputError: There is no such model, or it cannot be read.
    """
    from transformers import AutoConfig

    path, options = _place(source)
    try:
        return AutoConfig.from_pretrained(path, **options)
    except (*_LOADING_ERRORS, RecursionError) as error:
        raise InputError(f"{source.field}={source.path}: {_reason(error)}") from error


def skeleton(source: ModelSource) -> Any:
    """A model without its weights, which costs no memory and hardly any time: to see what modules it has.

    Raises:
        InputError: There is no such model, or it cannot be read.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(source)
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except _LOADING_ERRORS as error:
        raise InputError(f"{source.field}={source.path}: {_reason(error)}") from error


@lru_cache(maxsize=16)
def load_tokenizer(source: ModelSource) -> Any:
    """Loads the tokenizer of a model, which then knows the model's end tokens, its `chat_options`, and no clock.

    Raises:
        InputError: There is no such model, it cannot be read, nothing says what ends a turn, or its chat template is
            another one each time.
    """
    from transformers import AutoTokenizer, GenerationConfig

    path, options = _place(source)
    where, config = f"{source.field}={source.path}", load_config(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (*_LOADING_ERRORS, RecursionError) as error:
        raise InputError(f"{where}: {_reason(error)}") from error
    try:
        settings = GenerationConfig.from_pretrained(path, **{k: v for k, v in options.items() if k == "revision"})
    except (OSError, ValueError, TypeError):
        settings = GenerationConfig.from_model_config(config)
    declare_ends(tokenizer, settings.eos_token_id)
    if tokenizer.chat_template is not None:
        tokenizer.chat_template = _settled(tokenizer.chat_template, source)
    end = chat_turns(tokenizer).end
    if end is None:
        raise InputError(
            f"{where}: the tokenizer has no end-of-sequence token, and neither has the model's configuration"
        )
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        # Padding is masked everywhere, so any token will do; TRL would set it for some trainers and not for others.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _place(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """Where a model is loaded from, and with which options."""
    path, commit = locate(source)
    # Said in any case: left unsaid, transformers asks on a terminal, and runs what a "y" allows.
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    return path, options | ({"revision": commit} if commit else {})


@lru_cache(maxsize=1)
def load_model(source: ModelSource) -> LoadedModel:
    """Loads a model and its tokenizer, and says what was chosen; the last one stays in memory and is given again.

    Raises:
        InputError: There is no such model, it cannot be read, or the device is not there.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    path, options = _place(source)
    name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name if source.device == "auto" else source.device)
        if device.type == "cuda" and distributed.world_size() > 1:
            torch.cuda.set_device(distributed.local_rank())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"model.device={source.device}: {first_line(error)}") from error
    if source.dtype == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if half else torch.float32
    else:
        dtype = getattr(torch, source.dtype)
    _require_precision(source, device, dtype)
    attention = None if source.attention == "auto" else source.attention
    tokenizer = load_tokenizer(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention, **options)
    except _LOADING_ERRORS as error:
        raise InputError(f"{source.field}={source.path}: {_reason(error)}") from error
    size, precision = f"{model.num_parameters() / 1e6:,.1f}M parameters", str(dtype).removeprefix("torch.")
    kind = model.config._attn_implementation
    print(f"{source.path}: {size}, {precision}, {device}, {kind} attention", flush=True)
    return LoadedModel(model.to(device).eval(), tokenizer)


def _reason(error: Exception) -> str:
    """Why a model could not be loaded, in one line."""
    if "trust_remote_code" in str(error):
        return (
            "this model comes with code of its own, which is not run unless the command line says so "
            f"(model.trust_remote_code=true; of {called('analyze.py')} and {called('evaluate.py')} "
            "trust_remote_code=true)"
        )
    return first_line(error)


def _require_precision(source: ModelSource, device: Any, dtype: Any) -> None:
    """Computes something small in `dtype`; refuses it where the device cannot."""
    import torch

    try:
        if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
            raise RuntimeError("this GPU has no bfloat16")
        small = torch.ones(8, 8, dtype=dtype, device=device, requires_grad=True)
        torch.nn.functional.silu(small @ small).log_softmax(-1).sum().backward()
    except RuntimeError as error:
        raise InputError(f"model.dtype={source.dtype}: not on {device} ({first_line(error)})") from error


def _settled(template: Any, source: ModelSource) -> Any:
    """A chat template (or several by name) with the options and a clock that stands at its head.

    Whoever renders it gets the same text, today and tomorrow.

    Raises:
        InputError: It draws something at random, or the option that sets its clock is no date.
    """
    if isinstance(template, dict):
        return {name: _settled(text, source) for name, text in template.items()}
    if _RANDOM.search(template):
        raise InputError(
            f"{source.field}={source.path}: its chat template draws at random, so no prompt would stay the same"
        )
    values = json.loads(source.chat_options)
    now = values.pop(_CLOCK_NAME, CLOCK.isoformat(" "))
    head = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items())
    if _CLOCK_NAME not in template:
        return head + template
    try:
        clock = datetime.fromisoformat(now)
    except (ValueError, TypeError) as error:
        raise InputError(f"model.chat_options.{_CLOCK_NAME}={now}: a date like 2024-07-26") from error
    say_once(
        f"{source.path}: its chat template asks for the time, and is told {clock:%Y-%m-%d %H:%M} always"
        f" (model.chat_options.{_CLOCK_NAME})"
    )
    # A macro takes the place of the function that reads the clock.
    formatted = "".join(f".replace({json.dumps(code)}, {json.dumps(clock.strftime(code))})" for code in _CLOCK_CODES)
    return f"{{%- macro {_CLOCK_NAME}(format) -%}}{{{{ format{formatted} }}}}{{%- endmacro -%}}" + head + template


@contextmanager
def preserved(base: Any) -> Iterator[Any]:
    """Lends the base out and takes back exactly what was lent.

    PEFT replaces modules and freezes parameters, TRL replaces `forward`, disables dropout and edits the
    configuration. None of it may reach the next run.
    """
    import copy

    # A module keeps parameters, children, hooks and buffers in dictionaries that are edited in place.
    modules = [
        (
            module,
            {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(module).items()},
        )
        for module in base.modules()
    ]
    parameters = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    settings = [(holder, copy.deepcopy(vars(holder))) for holder in (base.config, base.generation_config)]
    try:
        yield base
    finally:
        for module, attributes in modules:
            vars(module).clear()
            for name, (value, content) in attributes.items():
                vars(module)[name] = value
                if content is not None:
                    value.clear()
                    value.update(content)
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        for holder, content in settings:
            vars(holder).clear()
            vars(holder).update(content)
