"""Sampling, verification and freezing of rollouts, unless they exist already."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from losslens.config.data import Data, RolloutConfig
from losslens.config.identity import identity_options
from losslens.config.interpolations import EMBEDDED_TEACHER, describe_derived
from losslens.config.parse import build, parse
from losslens.core.commands import command_name
from losslens.core.completions import Completion, Journal, report_truncation
from losslens.core.errors import InputError, ServerError, UnavailableError
from losslens.core.files import remove_leftovers
from losslens.core.hashing import hash_json, hash_text
from losslens.core.locks import file_lock
from losslens.core.notices import print_once
from losslens.core.provenance import versions
from losslens.core.redaction import hash_secrets, public_address
from losslens.models.loading import ModelSource, load_model, load_tokenizer, model_identity, source_of
from losslens.problems import Problem, ProblemSource, Split
from losslens.problems.fields import WithFieldNames, with_field_names
from losslens.problems.verification import verdicts
from losslens.rollouts.frozen import (
    VERSION,
    FrozenRollouts,
    find_rollouts,
    freeze,
    identity_of,
    load_rollouts,
    read_manifest,
)
from losslens.rollouts.quality import rollout_quality


def problem_source(data: Data) -> ProblemSource:
    """Creates the problem source of `data`.

    Raises:
        InputError: Its settings are invalid.
    """
    with with_field_names(data.field):
        source: ProblemSource = build(f"{data.field}.source", data.source)
    return WithFieldNames(source, data.field)


@dataclass(frozen=True)
class Contents:
    """Problems of a `data` section, identified by their content; usable as a cache key.

    Attributes:
        sha256: SHA-256 of the section, the split and the content.
        data: The section of the configuration.
        split: The split.
    """

    sha256: str
    data: Data = field(compare=False)
    split: Split = "train"


def contents_of(data: Data, split: Split) -> Contents:
    """Identifies the current content of `data`.

    Raises:
        InputError: Its settings are invalid, or its content does not exist.
    """
    identity = problem_source(data).identity(split)
    return Contents(hash_json([data.model_dump(mode="json"), identity], 64), data, split)


def held_out_problems(data: Data) -> list[Problem]:
    """Selects the problems that `data` scores on: `eval_size` held-out ones after the first `eval_offset`.

    Raises:
        InputError: As for `ProblemSource.problems`; or no problems are left after the first ones, or the source selects
            other first ones for another size.
    """
    source, size, offset = problem_source(data), data.eval_size, data.eval_offset
    if not offset:
        return source.problems("eval", size, data.seed)
    field = f"{data.field}.eval_offset={offset}"
    try:
        problems = source.problems("eval", None if size is None else offset + size, data.seed)
        first = source.problems("eval", offset, data.seed)
    except InputError as error:
        raise InputError(f"{field}: the problems after these cannot be selected ({error})") from error
    if len(problems) <= offset:
        raise InputError(f"{field}: no held-out problems are left after these")
    if problems[:offset] != first:  # a user-defined source
        raise InputError(f"{field}: the source selects other problems for another size; they cannot be told apart")
    return problems[offset:]


@lru_cache(maxsize=32)
def held_out_prompts(contents: Contents) -> tuple[str, ...]:
    """Returns the prompts of the problems that `contents.data` scores on, cached per process.

    Raises:
        InputError: As for `held_out_problems`.
    """
    return tuple(problem.prompt for problem in held_out_problems(contents.data))


def rollouts_identity(config: RolloutConfig, split: Split = "train") -> dict[str, Any]:
    """Returns the identity of the rollouts: their content if they are given, else how they are sampled.

    Raises:
        InputError: The model that samples them, the problems or the folder do not exist.
    """
    if config.rollouts.path is not None:
        return identity_of(read_manifest(Path(config.rollouts.path)))
    source = problem_source(config.data)
    problems = {**_problems_identity(config.data, split), "version": VERSION}
    if source.rollouts() is not None:  # with rewards of their own
        return problems
    problems |= config.data.verification
    sampling = config.rollouts
    if sampling.engine == "openai":
        # Token ids from the server are decoded with the base's tokenizer.
        ids = sampling.server.token_ids != "off"
        read_by = {"read_by": model_identity(source_of(config.model))} if ids else {}
        return {**problems, **_server_identity(config), "k": sampling.samples_per_prompt, **read_by}
    model = _writer(config)
    served = sampling.engine == "vllm"
    how = identity_options(sampling, ("path", "accept", "server", *["batch_size"] * served))
    if served:
        settings = {"args": sampling.server.args or {}, "extra_body": sampling.server.extra_body or {}}
        how["server"] = hash_secrets(settings)
    chat_options = {"chat_options": config.model.chat_options} if config.model.chat_options else {}
    return {**problems, "writer": model_identity(model), "sampling": how, "dtype": config.model.dtype, **chat_options}


def _problems_identity(data: Data, split: Split = "train") -> dict[str, Any]:
    return {
        **({} if split == "train" else {"split": split}), "source": problem_source(data).identity(split),
        "prompts": data.train_size, "seed": data.seed,
    }  # fmt: skip


def training_problems(config: RolloutConfig, method: str) -> tuple[dict[str, Any], ProblemSource]:
    """Returns identity and source of the problems whose prompts the frozen rollouts answer.

    Args:
        config: Configuration of the rollouts, which need not exist.
        method: The on-policy method that samples its own answers to them, for messages.

    Raises:
        InputError: The rollouts are given, and the problems with their verifier are not known.
    """
    source, problems = problem_source(config.data), _problems_identity(config.data)
    needs = f"method={method} samples its own answers, which needs problems with a verifier"
    if source.rollouts() is not None:
        raise InputError(f"data.path={config.data.path}: contains rollouts; {needs}")
    if config.rollouts.path is not None:
        recorded = read_manifest(Path(config.rollouts.path)).get("identity")
        if not isinstance(recorded, dict) or any(recorded.get(name) != value for name, value in problems.items()):
            raise InputError(
                f"rollouts.path={config.rollouts.path}: does not answer the problems of data={config.data.name} "
                f"(source, data.train_size, data.seed); {needs}"
            )
    return problems, source


def frozen_rollouts(config: RolloutConfig, split: Split = "train") -> FrozenRollouts:
    """Loads the rollouts of `config`; samples (or reads from the user's file), verifies and freezes them if missing.

    If several processes need the same rollouts, one samples them and the others wait. Interrupted sampling resumes.

    Args:
        config: Problems, model and sampling settings; `data.train_size` prompts are used.
        split: The problems to sample from.

    Raises:
        InputError: Data on disk are damaged, or the configuration is invalid.
        ServerError: The server does not answer; completions received so far are kept.
    """
    if config.rollouts.path is not None:
        return load_rollouts(Path(config.rollouts.path))
    parent = config.output_dir / "rollouts"
    # Checked first, so that an invalid configuration leaves no files behind.
    key = hash_json(rollouts_identity(config, split), 16)
    require_limits(config, split)
    (parent / ".partial").mkdir(parents=True, exist_ok=True)
    with file_lock(parent / ".partial" / f"{key}.lock"):
        folder = find_rollouts(parent, key) or _create(config, split, parent, key)
        # What a process left that was killed when it had frozen them.
        (parent / ".partial" / f"{key}.jsonl").unlink(missing_ok=True)
        remove_leftovers(parent)
    try:
        return load_rollouts(folder)
    except InputError as error:
        raise InputError(f"{error}; delete {folder} to make them again") from error


def require_limits(config: RolloutConfig, split: Split = "train") -> None:
    """Checks before sampling that the prompts fit the model that samples and the base; skips existing rollouts.

    Raises:
        InputError: A chat template fails, a prompt leaves no room for `rollouts.max_tokens`, or a token is unknown.
    """
    from losslens.models.limits import limits_of

    source, parent = problem_source(config.data), config.output_dir / "rollouts"
    given = config.rollouts.path is not None or source.rollouts() is not None
    if given or find_rollouts(parent, hash_json(rollouts_identity(config, split), 16)) is not None:
        return
    prompts = [problem.prompt for problem in source.problems(split, config.data.train_size, config.data.seed)]
    writer = [] if config.rollouts.engine == "openai" else [_writer(config)]
    for model in dict.fromkeys([*writer, source_of(config.model)]):
        limits_of(model).require_prompts(prompts, config.rollouts.max_tokens, "rollouts.max_tokens")
    if not writer:
        from losslens.models.tokens import is_templated

        tokenizer = limits_of(source_of(config.model)).tokenizer
        if templated := sum(is_templated(tokenizer, prompt) for prompt in dict.fromkeys(prompts)):
            print_once(
                f"rollouts: {templated} prompts are already in the base's chat template; the server will apply its"
                " model's again"
            )


def _server_identity(config: RolloutConfig) -> dict[str, Any]:
    """Returns the settings that determine a server's completions.

    The address is excluded: the same model may be served elsewhere later, and existing completions remain valid.
    """
    sampling = config.rollouts
    writer = {"server_model": sampling.server.model, "extra_body": hash_secrets(sampling.server.extra_body or {})}
    return {"writer": writer, "sampling": sampling.model_dump(include={"temperature", "top_p", "max_tokens", "seed"})}


def held_out_rollouts(config: RolloutConfig, problems: int, may_ask: bool = True) -> FrozenRollouts:
    """Samples one rollout of each of the first held-out problems, with policy and settings of the training rollouts.

    Args:
        config: Configuration of the training rollouts.
        problems: Number of problems; all are used if there are fewer.
        may_ask: Allows requests to a server for missing completions.

    Raises:
        UnavailableError: The training rollouts came from a file or folder, or the model that sampled them is not
            available.
        InputError: As for `frozen_rollouts`.
    """
    try:
        given: Path | str | None = config.rollouts.path
        if given is None and problem_source(config.data).rollouts() is not None:
            given = config.data.path
        if given is not None:
            raise InputError(f"the rollouts came from {given}, so no further ones can be sampled")
        changes = {
            "data": config.data.model_copy(update={"train_size": _at_most(config.data, problems)}),
            "rollouts": config.rollouts.model_copy(update={"samples_per_prompt": 1}),
        }
        changed = config.model_copy(update=changes)
        existing = find_rollouts(config.output_dir / "rollouts", hash_json(rollouts_identity(changed, "eval"), 16))
        if existing is None and not may_ask and config.rollouts.engine == "openai":
            raise InputError("the rollouts came from a server, which is used only if probe_set.base_url is set")
        require_limits(changed, "eval")
    except InputError as error:
        raise UnavailableError(f"{error}; {_PROBE_SET_REMEDY}") from error
    try:
        return frozen_rollouts(changed, "eval")
    except ServerError as error:
        raise UnavailableError(f"{error}; {_PROBE_SET_REMEDY}") from error


def _at_most(data: Data, problems: int) -> int:
    """Returns the number of held-out problems, at most `problems`."""
    source = problem_source(data)
    try:
        return len(source.problems("eval", problems, data.seed))
    except InputError:
        return len(source.problems("eval", None, data.seed))


_PROBE_SET_REMEDY = "set probe_set.completions=FOLDER"
WRITERS = (
    "rollouts.policy=base (the model itself), model.teacher=FOLDER_OR_HUB_ID, "
    "or rollouts.engine=openai rollouts.server.model=NAME"
)


def _writer(config: RolloutConfig) -> ModelSource:
    model = config.model
    if config.rollouts.policy == "base":
        return source_of(model)
    if model.teacher is None:
        # Errors in a problem file take precedence.
        problem_source(config.data).problems("train", config.data.train_size, config.data.seed)
        why = "the embedded one is not for your own files" if model.name == "tiny" else f"model.path={model.path}"
        raise InputError(
            f"rollouts.policy=teacher: no model.teacher is set ({why}); choose what samples the rollouts: {WRITERS}"
        )
    return source_of(model, teacher=True)


def explain_unsuitable_teacher(config: RolloutConfig) -> str:
    """Explains in one line why the teacher cannot solve the problems; empty if that is not known of it."""
    sampling, model = config.rollouts, config.model
    uses_teacher = sampling.path is None and sampling.engine != "openai" and sampling.policy == "teacher"
    if (
        not uses_teacher
        or model.teacher != EMBEDDED_TEACHER
        or not str(config.data.source["_target_"]).endswith("HubDataset")
    ):
        return ""
    return (
        f"data={config.data.name}: the embedded teacher can only solve data=arithmetic; "
        f"choose what samples the rollouts: {WRITERS}"
    )


def require_suitable_teacher(config: RolloutConfig) -> None:
    """Refuses to sample missing rollouts from a teacher that cannot solve the problems.

    Raises:
        InputError: The rollouts are missing, and the teacher cannot solve the problems.
    """
    if (why := explain_unsuitable_teacher(config)) and not find_rollouts(
        config.output_dir / "rollouts", hash_json(rollouts_identity(config), 16)
    ):
        raise InputError(why)


def _create(config: RolloutConfig, split: Split, parent: Path, key: str) -> Path:
    started = datetime.now(UTC)
    source = problem_source(config.data)
    name = config.data.name if split == "train" else f"{config.data.name}-heldout"
    manifest = {"keys": [key], "identity": rollouts_identity(config, split), "versions": versions()}
    given = source.rollouts()
    if given is not None:
        origin = {"made": started.isoformat(timespec="seconds"), "writer": config.data.path}
        return _freeze(first_prompts(given, config.data), parent, name, {**manifest, **origin})
    problems = source.problems(split, config.data.train_size, config.data.seed)
    completions, given_prompts, facts = _completions(config, problems, split, parent, key)
    report_truncation(
        [c for group in completions for c in group], name, "rollouts.max_tokens", config.rollouts.max_tokens
    )
    table = _verified(config, source, problems, completions, given_prompts)
    facts |= {
        "unchecked": int((table["trouble"] != "").sum()),
        "made": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds(), 1),
    }
    folder = _freeze(table, parent, name, {**manifest, **facts})
    (parent / ".partial" / f"{key}.jsonl").unlink(missing_ok=True)
    return folder


def _freeze(table: pd.DataFrame, parent: Path, name: str, manifest: dict[str, Any]) -> Path:
    # Another process may freeze the same content under other settings at the same time.
    with file_lock(parent / ".lock"):
        return freeze(table, parent, name, manifest)


def first_prompts(given: pd.DataFrame, data: Data) -> pd.DataFrame:
    """Selects the rollouts of the first `data.train_size` prompts; of all if it is None."""
    ids = given["problem_id"].drop_duplicates()
    if data.train_size is not None and data.train_size > len(ids):
        raise InputError(f"data.train_size={data.train_size}: {data.path} has only {len(ids)} prompts; null uses all")
    return given[given["problem_id"].isin(ids[: data.train_size])].reset_index(drop=True)


def _completions(
    config: RolloutConfig, problems: Sequence[Problem], split: Split, parent: Path, key: str
) -> tuple[list[list[Completion]], list[str | None], dict[str, Any]]:
    """Returns the completions of each problem, the rendered prompts, and facts for the manifest."""
    what = "rollouts" if split == "train" else "held-out completions"
    if config.rollouts.engine == "openai":
        completions, asked = _from_server(config, problems, what, parent)
        facts = {**_bill(config, completions), "asked_now": asked}
        completions, prompt_texts, tokenizer = _read_served(config, problems, completions)
        return completions, prompt_texts, {**facts, "tokenizer": tokenizer}
    if config.rollouts.engine == "vllm":
        return _from_vllm(config, problems, what, parent, key)
    from losslens.models.tokens import describe_tokenizer, encode_prompt, render_prompt
    from losslens.sampling.local import generate_samples

    sampling = config.rollouts
    writer = _writer(config)
    loaded = load_model(writer)
    prompts = [problem.prompt for problem in problems]
    journal = Journal(parent / ".partial" / f"{key}.jsonl")
    try:
        completions = generate_samples(
            loaded.model,
            loaded.tokenizer,
            prompts,
            samples=sampling.samples_per_prompt,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_tokens,
            batch_size=sampling.batch_size,
            seed=sampling.seed,
            description=f"{what} from the {sampling.policy}",
            journal=journal,
            record_logps=True,
        )
    finally:
        journal.close()
    facts = {
        "policy": sampling.policy, "writer": writer.path, "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype),
    }  # fmt: skip
    texts = [render_prompt(loaded.tokenizer, prompt) for prompt in prompts]
    facts["tokenizer"] = describe_tokenizer(loaded.tokenizer, texts)
    given = [tuple(encode_prompt(loaded.tokenizer, prompt)) for prompt in prompts]
    completions = [
        [replace(completion, prompt_ids=ids) for completion in group]
        for ids, group in zip(given, completions, strict=True)
    ]
    return completions, list(texts), facts


def _from_vllm(
    config: RolloutConfig, problems: Sequence[Problem], what: str, parent: Path, key: str
) -> tuple[list[list[Completion]], list[str | None], dict[str, Any]]:
    """Samples with a vLLM server that is started for it; returns the same as `_completions`."""
    from losslens.models.tokens import describe_tokenizer, encode_prompt, read_server_completion, render_prompt
    from losslens.sampling.server import Decoding, Request
    from losslens.sampling.vllm import BASE_NAME, Needs, neutral_fields, stop_vllm, vllm_server

    sampling, writer = config.rollouts, _writer(config)
    tokenizer = load_tokenizer(writer)
    prompts = [problem.prompt for problem in problems]
    given = {prompt: tuple(encode_prompt(tokenizer, prompt)) for prompt in prompts}
    needs = Needs(writer, max(map(len, given.values())) + sampling.max_tokens)
    count = sampling.samples_per_prompt
    requests = {
        str(number): Request(
            prompts[number // count], random.Random(f"{sampling.seed} {number}").getrandbits(31),
            given[prompts[number // count]],
        )
        for number in range(count * len(prompts))
    }  # fmt: skip
    fields = {**neutral_fields(writer), **(sampling.server.extra_body or {})}
    asks_logps = sampling.server.logprobs == "auto"
    journal = Journal(parent / ".partial" / f"{key}.jsonl")
    try:
        server = vllm_server("rollouts.server", sampling.server, needs, config.output_dir / ".vllm")
        missing = {name: request for name, request in requests.items() if name not in journal.completions}
        decoding = Decoding(sampling.temperature, sampling.top_p, sampling.max_tokens, fields, asks_logps)
        shown = f"{what} from the {sampling.policy}"
        add = lambda name, completion: journal.add({name: completion})  # noqa: E731
        server.ask(BASE_NAME, missing, decoding, add, shown)
        facts = {"policy": sampling.policy, "writer": writer.path, **server.facts}
    finally:
        journal.close()
        stop_vllm()  # the weights that sampled are seldom those that are scored, and training needs the memory
    answers = [read_server_completion(tokenizer, r.prompt, journal.completions[name]) for name, r in requests.items()]
    texts: list[str | None] = [render_prompt(tokenizer, prompt) for prompt in prompts]
    facts["tokenizer"] = describe_tokenizer(tokenizer, [text for text in texts if text is not None])
    return [answers[i : i + count] for i in range(0, len(answers), count)], texts, facts


def _read_served(
    config: RolloutConfig, problems: Sequence[Problem], completions: Sequence[Sequence[Completion]]
) -> tuple[list[list[Completion]], list[str | None], dict[str, Any] | None]:
    """Decodes a server's completions from their token ids, if any; also returns rendered prompts and the tokenizer.

    Token ids that do not match the server's text, such as those of a tokenizer other than the base's, are dropped.
    """
    prompts = [problem.prompt for problem in problems]
    if not any(completion.ids for group in completions for completion in group):
        return [list(group) for group in completions], [None] * len(problems), None
    from losslens.models.tokens import decode, describe_tokenizer, read_server_completion

    tokenizer = load_tokenizer(source_of(config.model))
    read = [
        [read_server_completion(tokenizer, prompt, completion) for completion in group]
        for prompt, group in zip(prompts, completions, strict=True)
    ]
    dropped = sum(completion.ids is not None for group in completions for completion in group)
    dropped -= sum(completion.ids is not None for group in read for completion in group)
    if dropped:
        print(
            f"{config.rollouts.server.model}: dropped the token ids of {dropped} completions, which do not match their"
            " text with the tokenizer of model.path",
            flush=True,
        )
    texts: list[str | None] = []
    for group in read:
        given = {completion.prompt_ids for completion in group}
        [ids] = given if len(given) == 1 else [None]
        texts.append(None if ids is None else decode(tokenizer, ids))
    return read, texts, describe_tokenizer(tokenizer, [text for text in texts if text is not None])


def _from_server(
    config: RolloutConfig, problems: Sequence[Problem], what: str, parent: Path
) -> tuple[list[list[Completion]], int]:
    """Returns the server's completions, requesting only those not stored yet, and the number of requests."""
    from losslens.sampling.server import Decoding, Request, ask

    sampling, server = config.rollouts, config.rollouts.server
    file = parent / ".answers" / f"{hash_json(_server_identity(config), 16)}.jsonl"
    file.parent.mkdir(exist_ok=True)
    names = [
        [f"{hash_text(problem.prompt)} {sample}" for sample in range(sampling.samples_per_prompt)]
        for problem in problems
    ]
    with file_lock(file.with_suffix(".lock")):
        journal = Journal(file)
        try:
            requests = {
                name: Request(problem.prompt, random.Random(f"{sampling.seed} {name}").getrandbits(31))
                for problem, group in zip(problems, names, strict=True)
                for name in group
                if name not in journal.completions
            }
            total = sum(map(len, names))
            if len(requests) < total:
                print(f"reusing {total - len(requests)} of {total} completions of {server.model}", flush=True)
            decoding = Decoding(
                sampling.temperature,
                sampling.top_p,
                sampling.max_tokens,
                server.extra_body or {},
                logps=server.logprobs == "auto",
            )
            ask(
                "rollouts.server",
                server,
                str(server.model),
                requests,
                decoding,
                lambda name, completion: journal.add({name: completion}),
                f"{what} from {server.model}",
            )
        finally:
            journal.close()
    return [[journal.completions[name] for name in group] for group in names], len(requests)


def _bill(config: RolloutConfig, completions: Sequence[Sequence[Completion]]) -> dict[str, Any]:
    """Returns the manifest's facts about a server: model, address, numbers of tokens, and their cost."""
    from losslens.sampling.server import address, cost

    server = config.rollouts.server
    answers = [completion for group in completions for completion in group]
    facts: dict[str, Any] = {"policy": "server", "writer": server.model, "base_url": public_address(address(server))}
    known = [(c.prompt_tokens, c.tokens) for c in answers if c.prompt_tokens is not None and c.tokens is not None]
    if len(known) < len(answers):  # the server does not report all counts
        return facts | {"prompt_tokens": None, "completion_tokens": None, "cost": None}
    prompt_tokens, completion_tokens = sum(p for p, _ in known), sum(c for _, c in known)
    bill = cost(server, prompt_tokens, completion_tokens)
    return facts | {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "cost": bill}


def _verified(
    config: RolloutConfig,
    source: ProblemSource,
    problems: Sequence[Problem],
    completions: Sequence[Sequence[Completion]],
    prompt_texts: Sequence[str | None],
) -> pd.DataFrame:
    """Verifies the completions; returns one row per rollout, with its reward and any trouble in verification."""
    rows = [
        {
            "problem_id": problem.id,
            "prompt": problem.prompt,
            "prompt_text": prompt_text,
            "completion": completion.text,
            "answer": problem.answer,
            "sample": number,
            "source": config.rollouts.server.model if config.rollouts.engine == "openai" else config.rollouts.policy,
            "tokens": completion.tokens,
            "finished": completion.finished,
            "prompt_ids": completion.prompt_ids and list(completion.prompt_ids),
            "completion_ids": completion.ids and list(completion.ids),
            "sampler_logps": completion.sampler_logps and list(completion.sampler_logps),
            "sampler_raw_logps": completion.sampler_raw_logps and list(completion.sampler_raw_logps),
        }
        for problem, prompt_text, group in zip(problems, prompt_texts, completions, strict=True)
        for number, completion in enumerate(group)
    ]
    table = pd.DataFrame(rows)
    repeated = [problem for problem, group in zip(problems, completions, strict=True) for _ in group]
    verified = verdicts(source.verifier, repeated, list(table["completion"]), config.data.verify_seconds)
    return table.assign(reward=[float(v.correct) for v in verified], trouble=[v.trouble for v in verified])


def rollout_job(config: DictConfig) -> None:
    """Runs the job of `rollout.py`: finds or samples the rollouts and prints a summary of them."""
    settings = parse(RolloutConfig, config)
    sampled = settings.rollouts.path is None and problem_source(settings.data).rollouts() is None
    if sampled and (line := describe_derived(config)):
        print(line, flush=True)
    if why := explain_unsuitable_teacher(settings):
        print(f"{command_name('rollout.py')}: {why}", file=sys.stderr, flush=True)
    rollouts = frozen_rollouts(settings)
    print(rollouts.folder)
    for name, value in rollout_quality(rollouts).items():
        print(f"  {name}: {value}")
    prompts, completions = (rollouts.manifest.get(name) for name in ("prompt_tokens", "completion_tokens"))
    if prompts is not None and completions is not None:
        from losslens.sampling.server import cost

        print(f"  server tokens: {prompts} in prompts, {completions} in completions")
        price = cost(settings.rollouts.server, prompts, completions)
        if price is not None:
            print(f"  cost: {price:g}")
