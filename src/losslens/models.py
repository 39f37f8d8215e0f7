"""The base model and its tokenizer: where they come from, how they are loaded, and lending the base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from losslens import hub, packaged, processes
from losslens.config import Model
from losslens.errors import InputError, UnavailableError, first_line
from losslens.files import sha256_of_folder

# torch, transformers and peft are imported where they are needed: a sweep that is finished must not wait for them.

_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt", "*.py")


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
        chat_options: Variables of the chat template as JSON, for example `{"enable_thinking": false}`.
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
def located(source: ModelSource) -> tuple[str, str | None]:
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
        return source.path, hub.commit_of(source.field, source.path, source.revision)
    try:
        folder = packaged.converted(source.package)
    except UnavailableError as error:
        raise InputError(f"{source.field}={source.path}: the hub cannot be reached, and {error}") from error
    print(f"{source.path}: the hub cannot be reached; taking the weights in the package {source.package}", flush=True)
    return str(folder), None


@lru_cache(maxsize=16)
def model_identity(source: ModelSource) -> dict[str, str | None]:
    """What tells a model from another, wherever it lies: the content of a folder, or a hub id and its commit.

    A packaged model is known by its GGUF file. It is not the model of the hub: its weights were quantised.

    Raises:
        InputError: As for `located`.
    """
    path, commit = located(source)
    if commit is not None:
        return {"hub_id": path, "revision": commit}
    if path != str(Path(source.path).expanduser()):
        assert source.package is not None
        return packaged.identity(source.package)
    return {"sha256": sha256_of_folder(Path(path), _MODEL_FILES)}


@lru_cache(maxsize=1)
def load_model(source: ModelSource) -> LoadedModel:
    """Loads a model and its tokenizer, and says what was chosen; the last one stays in memory and is given again.

    Raises:
        InputError: There is no such model, it cannot be read, or the device is not there.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path, commit = located(source)
    name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name if source.device == "auto" else source.device)
        if device.type == "cuda" and processes.count() > 1:
            torch.cuda.set_device(processes.local_rank())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"model.device={source.device}: {first_line(error)}") from error
    if source.dtype == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if half else torch.float32
    else:
        dtype = getattr(torch, source.dtype)
    attention = None if source.attention == "auto" else source.attention
    options = {"revision": commit, "trust_remote_code": source.trust_remote_code}
    options = {key: value for key, value in options.items() if value}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention, **options)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, SafetensorError) as error:
        raise InputError(f"{source.field}={source.path}: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{source.field}={source.path}: the tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any token will do; TRL would set it for some trainers and not for others.
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is not None:
        tokenizer.chat_template = _with_assignments(tokenizer.chat_template, source.chat_options)
    size, precision = f"{model.num_parameters() / 1e6:,.1f}M parameters", str(dtype).removeprefix("torch.")
    kind = model.config._attn_implementation
    print(f"{source.path}: {size}, {precision}, {device}, {kind} attention", flush=True)
    return LoadedModel(model.to(device).eval(), tokenizer)


def without_weights(source: ModelSource) -> Any:
    """The modules of a model as its configuration describes them, on torch's `meta` device.

    Raises:
        InputError: As for `located`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path, commit = located(source)
    trusted = source.trust_remote_code
    config = AutoConfig.from_pretrained(path, trust_remote_code=trusted, **({"revision": commit} if commit else {}))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)


def _with_assignments(template: Any, chat_options: str) -> Any:
    """A chat template (or several by name) with the options at its head: whoever renders it gets the same text."""
    if isinstance(template, dict):
        return {name: _with_assignments(text, chat_options) for name, text in template.items()}
    values = json.loads(chat_options)
    return "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items()) + template


@contextmanager
def as_it_was(base: Any) -> Iterator[Any]:
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
