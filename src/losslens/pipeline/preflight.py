"""Checks that a run fits its base, before anything is sampled, trained or written."""

from __future__ import annotations

from functools import lru_cache

from losslens.core import distributed
from losslens.core.errors import InputError
from losslens.losses.on_policy import OnPolicy
from losslens.models.loading import ModelSource, load_config, load_tokenizer, source_of
from losslens.models.trained_weights import require_tunable
from losslens.rollouts.sample import (
    Contents,
    contents_of,
    first_prompts,
    held_out_prompts,
    problem_source,
    require_limits,
)
from losslens.runs.reference_adapters import reference_folder
from losslens.runs.spec import RunSpec


def require_fit(spec: RunSpec) -> None:
    """Checks that the base has the target modules and can process the rollouts and prompts of a run.

    Checks that several jobs of a process share are done once.

    Raises:
        InputError: The base cannot be trained as configured, the chat template fails, or a sequence is too long.
    """
    config = spec.config
    source = source_of(config.model)
    require_tunable(source, spec.lora)
    if spec.method.own_samples:
        _require_samples_fit(spec, source)
    else:
        require_limits(config)
    if config.rollouts.path is None and not spec.method.own_samples:
        _require_rollouts_fit(source, contents_of(config.data, "train"))
    if isinstance(config.weight_tracking.references, dict) and spec.lora is not None:
        for label, reference in config.weight_tracking.references.items():
            reference_folder(label, reference, config.output_dir / config.sweep)
    for name, section in (("rollouts", config.rollouts), ("evaluation", config.evaluation)):
        if section.engine == "vllm":
            from losslens.sampling.vllm import require_command

            require_command(f"{name}.server", section.server)
    if config.evaluation.engine != "openai":
        for data in config.benchmarks:
            _require_prompts_fit(source, held_out_prompts(contents_of(data, "eval")), config.evaluation.max_tokens)


def _require_samples_fit(spec: RunSpec, source: ModelSource) -> None:
    """Checks that the base can answer the training prompts, and that a teacher has its vocabulary."""
    config, method = spec.config, spec.method
    assert isinstance(method, OnPolicy)
    own = "method" if method.max_tokens is not None else "rollouts"
    problems = problem_source(config.data).problems("train", config.data.train_size, config.data.seed)
    prompts = tuple(problem.prompt for problem in problems)
    _require_prompts_fit(source, prompts, spec.max_tokens, f"{own}.max_tokens")
    share = config.optim.per_process_batch(distributed.world_size())
    if share % method.group_size:
        raise InputError(
            f"method.samples_per_prompt={method.group_size} does not divide {share}, the samples of a step and process "
            "(optim.batch_size over the number of processes)"
        )
    if method.needs_teacher:
        _require_one_vocabulary(source, spec.teacher)


@lru_cache(maxsize=32)
def _require_one_vocabulary(base: ModelSource, teacher: ModelSource) -> None:
    vocabularies = [
        (load_config(model).get_text_config().vocab_size, load_tokenizer(model).get_vocab())
        for model in (base, teacher)
    ]
    if vocabularies[0] != vocabularies[1]:
        raise InputError(
            f"model.teacher={teacher.path}: another vocabulary than that of model.path={base.path}; its distributions "
            "cannot be compared with the base's"
        )


@lru_cache(maxsize=32)
def _require_rollouts_fit(source: ModelSource, contents: Contents) -> None:
    """Checks that user-provided rollouts fit the context of the base."""
    provided = problem_source(contents.data).rollouts()
    if provided is None:
        return
    from losslens.models.limits import limits_of
    from losslens.training.batches import tokenise

    limits = limits_of(source)
    rows = tokenise(first_prompts(provided, contents.data), limits.tokenizer)
    limits.require_sequences(str(contents.data.path), list(rows["prompt_ids"]), list(rows["completion_ids"]))


@lru_cache(maxsize=32)
def _require_prompts_fit(
    source: ModelSource, prompts: tuple[str, ...], max_tokens: int, field: str = "evaluation.max_tokens"
) -> None:
    """Checks that prompts leave room for an answer."""
    from losslens.models.limits import limits_of

    limits_of(source).require_prompts(prompts, max_tokens, field)
