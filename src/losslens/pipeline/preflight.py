"""Checks of a run before anything is sampled, trained or written: what the model could not take is refused."""

from __future__ import annotations

from functools import lru_cache

from losslens.models.adapters import require_targets
from losslens.models.loading import ModelSource, source_of
from losslens.rollouts.sample import Contents, contents_of, first_prompts, problem_source, prompts_of, require_limits
from losslens.runs.spec import RunSpec


def require_fit(spec: RunSpec) -> None:
    """Refuses what the base cannot be trained on, or asked, before anything is sampled, trained or written.

    What several jobs of a process have in common is looked at once.

    Raises:
        InputError: A module that is to be adapted is not there, the chat template fails, or something is too long.
    """
    config = spec.config
    source = source_of(config.model)
    require_targets(source, spec.lora)
    require_limits(config)
    if config.rollouts.path is None:
        _require_given(source, contents_of(config.data, "train"))
    if config.evaluation.engine == "transformers":
        for data in config.benchmarks:
            _require_room(source, prompts_of(contents_of(data, "eval"), data.eval_size), config.evaluation.max_tokens)


@lru_cache(maxsize=32)
def _require_given(source: ModelSource, contents: Contents) -> None:
    """Refuses a file of rollouts of one's own that the base cannot be shown."""
    given = problem_source(contents.data).rollouts()
    if given is None:
        return
    from losslens.models.limits import limits_of
    from losslens.training.batches import tokenise

    limits = limits_of(source)
    rows = tokenise(first_prompts(given, contents.data), limits.tokenizer)
    limits.require_sequences(str(contents.data.path), list(rows["prompt_ids"]), list(rows["completion_ids"]))


@lru_cache(maxsize=32)
def _require_room(source: ModelSource, prompts: tuple[str, ...], max_tokens: int) -> None:
    """Refuses prompts of benchmarks that leave no room for an answer."""
    from losslens.models.limits import limits_of

    limits_of(source).require_prompts(prompts, max_tokens, "evaluation.max_tokens")
