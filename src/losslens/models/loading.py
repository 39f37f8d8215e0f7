"""Loading of models and tokenizers, and preservation of the shared base model."""

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
from losslens.core.commands import command_name
from losslens.core.errors import InputError, UnavailableError, first_line
from losslens.core.hashing import hash_folder
from losslens.core.notices import print_once
from losslens.models import gguf_package
from losslens.models.tokens import chat_turns, declare_ends

# torch, transformers and peft are imported only where needed, so that a completed sweep does not wait for them.

_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
# `SafetensorError`, raised for damaged files, derives directly from `Exception`.
_LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, SafetensorError)

_CLOCK_NAME = "strftime_now"  # transformers' function for the current date in chat templates
_CLOCK_CODES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAwdbBmyYHIpMSfzZjUWcxXGuVDFTReklhCg"]
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")


@dataclass(frozen=True)
class ModelSource:
    """Location of a model and options for loading it.

    Attributes:
        field: Configuration key that names the model, for messages.
        path: A local folder or a hub id.
        revision: Commit, tag or branch of a hub id.
        dtype: Precision of the weights; `auto` is float32 on the CPU and bfloat16 on CUDA.
        device: A torch device; `auto` is CUDA if available.
        trust_remote_code: Allows code that comes with the model to run.
        attention: Attention implementation; `auto` leaves the choice to transformers: `sdpa` if the model supports it.
        package: A Python package that ships the model, used if the hub cannot be reached.
        chat_options: Variables of the chat template as JSON, for example `{"enable_thinking": false}`; `strftime_now`
            is the date that templates see.
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
    """A model in memory and its tokenizer."""

    model: Any
    tokenizer: Any


def source_of(model: Model, teacher: bool = False) -> ModelSource:
    """Returns the source of a configuration's base model, or of its teacher."""
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
    """Resolves where a model is loaded from: a folder and None, or a hub id and its commit.

    Raises:
        InputError: `path` is neither a folder that contains a model nor a hub id that can be loaded.
    """
    folder = Path(source.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{source.field}={source.path}: no config.json in this folder")
        if not any(folder.glob("*.safetensors")) and (pickled := sorted(folder.glob("*.bin"))):
            raise InputError(
                f"{source.field}={source.path}: {pickled[0].name} is a pickle, which can run code and is not read; "
                "save the model as safetensors"
            )
        return str(folder), None
    if not hub.is_hub_id(source.path) or ("/" in source.path and Path(source.path).parent.is_dir()):
        raise InputError(f"{source.field}={source.path}: no such folder")
    if source.package is None or hub.is_available(source.field, source.path, source.revision):
        return source.path, hub.resolve_commit(source.field, source.path, source.revision)
    try:
        folder = gguf_package.converted_folder(source.package)
    except UnavailableError as error:
        raise InputError(f"{source.field}={source.path}: the hub cannot be reached, and {error}") from error
    print(f"{source.path}: the hub cannot be reached; using the weights of the package {source.package}", flush=True)
    return str(folder), None


def weights_folder(source: ModelSource) -> Path:
    """Returns the folder with a model's weights, which are downloaded if they are only on the hub.

    Raises:
        InputError: As for `locate`.
    """
    path, commit = locate(source)
    return Path(path) if commit is None else hub.model_folder(source.field, path, commit)


@lru_cache(maxsize=16)
def model_identity(source: ModelSource) -> dict[str, str | None]:
    """Returns the identity of a model, independent of its location: hash of a folder's content, or hub id and commit.

    A packaged model is identified by its GGUF file. It differs from the hub's model, since its weights are quantised.

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


# The date that chat templates see: the default of Llama's templates. With the real date, the prompts of a run would
# change from one day to the next.
CLOCK = datetime(2024, 7, 26)


@lru_cache(maxsize=16)
def load_config(source: ModelSource) -> Any:
    """Loads the configuration of a model.

    Raises:
        InputError: The model does not exist or cannot be read.
    """
    from transformers import AutoConfig

    path, options = _load_options(source)
    try:
        return AutoConfig.from_pretrained(path, **options)
    except (*_LOADING_ERRORS, RecursionError) as error:
        raise InputError(f"{source.field}={source.path}: {_reason(error)}") from error


def skeleton(source: ModelSource) -> Any:
    """Creates a model without its weights, fast and without memory, to inspect its modules.

    Raises:
        InputError: The model does not exist or cannot be read.
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
    """Loads the tokenizer of a model, with the model's end tokens, its `chat_options` and a fixed date.

    Raises:
        InputError: The model does not exist or cannot be read, has no end token, or has a random chat template.
    """
    from transformers import AutoTokenizer, GenerationConfig

    path, options = _load_options(source)
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
        tokenizer.chat_template = _fix_template(tokenizer.chat_template, source)
    end = chat_turns(tokenizer).end
    if end is None:
        raise InputError(f"{where}: neither the tokenizer nor the model's configuration has an end-of-sequence token")
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        # Padding is masked everywhere, so any token will do. TRL sets one for some trainers only.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_options(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """Returns the folder or hub id of a model and the keyword arguments for `from_pretrained`."""
    path, commit = locate(source)
    # Always set: otherwise transformers asks on a terminal whether to run the code.
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    return path, options | ({"revision": commit} if commit else {})


@lru_cache(maxsize=1)
def load_model(source: ModelSource) -> LoadedModel:
    """Loads a model and its tokenizer, and prints device, precision and attention; caches the last one.

    Raises:
        InputError: The model does not exist or cannot be read, or the device or precision is not available.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    path, options = _load_options(source)
    try:
        device = _device(source)
        if device.type == "cuda" and distributed.world_size() > 1:
            torch.cuda.set_device(distributed.local_rank())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"model.device={source.device}: {first_line(error)}") from error
    dtype = getattr(torch, resolve_dtype(source))
    _require_precision(source, device, dtype)
    attention = None if source.attention == "auto" else source.attention
    tokenizer = load_tokenizer(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, use_safetensors=True, **options
        )
    except _LOADING_ERRORS as error:
        raise InputError(f"{source.field}={source.path}: {_reason(error)}") from error
    size, precision = f"{model.num_parameters() / 1e6:,.1f}M parameters", str(dtype).removeprefix("torch.")
    kind = model.config._attn_implementation
    print(f"{source.path}: {size}, {precision}, {device}, {kind} attention", flush=True)
    return LoadedModel(model.to(device).eval(), tokenizer)


def resolve_dtype(source: ModelSource) -> str:
    """Returns the precision of a model's weights; that of `auto` depends on the device."""
    import torch

    if source.dtype != "auto":
        return source.dtype
    half = _device(source).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if half else "float32"


def _device(source: ModelSource) -> Any:
    import torch

    name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name if source.device == "auto" else source.device)


def _reason(error: Exception) -> str:
    """Returns in one line why a model could not be loaded."""
    if "trust_remote_code" in str(error):
        return (
            "this model comes with its own code, which only runs if the command line allows it "
            f"(model.trust_remote_code=true; for {command_name('analyze.py')} and {command_name('evaluate.py')} "
            "trust_remote_code=true)"
        )
    return first_line(error)


def _require_precision(source: ModelSource, device: Any, dtype: Any) -> None:
    """Checks with a small computation that the device supports `dtype`."""
    import torch

    try:
        if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
            raise RuntimeError("this GPU does not support bfloat16")
        small = torch.ones(8, 8, dtype=dtype, device=device, requires_grad=True)
        torch.nn.functional.silu(small @ small).log_softmax(-1).sum().backward()
    except RuntimeError as error:
        raise InputError(f"model.dtype={source.dtype}: not supported on {device} ({first_line(error)})") from error


def _fix_template(template: Any, source: ModelSource) -> Any:
    """Prepends the chat options and a fixed date to a chat template (or to several, by name).

    The rendered text is then the same for every caller and on every day.

    Raises:
        InputError: The template is random, or the option with the date is not a date.
    """
    if isinstance(template, dict):
        return {name: _fix_template(text, source) for name, text in template.items()}
    if _RANDOM.search(template):
        raise InputError(
            f"{source.field}={source.path}: the chat template is random, so prompts would not be reproducible"
        )
    values = json.loads(source.chat_options)
    now = values.pop(_CLOCK_NAME, CLOCK.isoformat(" "))
    head = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items())
    if _CLOCK_NAME not in template:
        return head + template
    try:
        clock = datetime.fromisoformat(now)
    except (ValueError, TypeError) as error:
        raise InputError(f"model.chat_options.{_CLOCK_NAME}={now}: must be a date like 2024-07-26") from error
    print_once(
        f"{source.path}: the chat template contains the date, which is fixed to {clock:%Y-%m-%d %H:%M}"
        f" (model.chat_options.{_CLOCK_NAME})"
    )
    # A macro replaces the function that reads the clock.
    formatted = "".join(f".replace({json.dumps(code)}, {json.dumps(clock.strftime(code))})" for code in _CLOCK_CODES)
    return f"{{%- macro {_CLOCK_NAME}(format) -%}}{{{{ format{formatted} }}}}{{%- endmacro -%}}" + head + template


@contextmanager
def preserved(base: Any) -> Iterator[Any]:
    """Restores the base after the block: modules, hooks, `requires_grad`, gradients and configuration.

    PEFT replaces modules and freezes parameters; TRL replaces `forward`, disables dropout and edits the configuration.
    None of this may affect the next run.
    """
    import copy

    # A module's parameters, children, hooks and buffers are in dictionaries that are edited in place.
    modules = [
        (
            module,
            {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(module).items()},
        )
        for module in base.modules()
    ]
    parameters = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    # A model with several parts has a configuration for each, beside that of the whole.
    configs = [module.config for module in base.modules() if hasattr(module, "config")]
    holders = {id(holder): holder for holder in (base.config, base.generation_config, *configs)}
    settings = [(holder, copy.deepcopy(vars(holder))) for holder in holders.values()]
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
