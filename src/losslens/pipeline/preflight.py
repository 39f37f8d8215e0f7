"""Checks that a run fits its base, before anything is sampled, trained or written."""

from __future__ import annotations

from functools import lru_cache

from losslens.models.adapters import require_targets
from losslens.models.loading import ModelSource, source_of
from losslens.rollouts.sample import (
    Contents,
    contents_of,
    first_prompts,
    held_out_prompts,
    problem_source,
    require_limits,
)
from losslens.runs.spec import RunSpec


def require_fit(spec: RunSpec) -> None:
    """Checks that the base has the target modules and can process the rollouts and prompts of a run.

    Checks that several jobs of a process share are done once.

    Raises:
        InputError: A target module does not exist, the chat template fails, or a sequence is too long.
    """
    config = spec.config
    source = source_of(config.model)
    require_targets(source, spec.lora)
    require_limits(config)
    if config.rollouts.path is None:
        _require_rollouts_fit(source, contents_of(config.data, "train"))
    if config.evaluation.engine == "transformers":
        for data in config.benchmarks:
            _require_prompts_fit(source, held_out_prompts(contents_of(data, "eval")), config.evaluation.max_tokens)


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
def _require_prompts_fit(source: ModelSource, prompts: tuple[str, ...], max_tokens: int) -> None:
    """Checks that benchmark prompts leave room for an answer."""
    from losslens.models.limits import limits_of

    limits_of(source).require_prompts(prompts, max_tokens, "evaluation.max_tokens")
