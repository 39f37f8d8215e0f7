"""The probe set: fixed held-out completions on which all models are measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from losslens.analysis.manifests import RunFacts
from losslens.config.analysis import ProbeSet
from losslens.config.data import RolloutConfig
from losslens.core.errors import InputError, UnavailableError
from losslens.measures.forward import Sequences
from losslens.models.tokens import encode_completion
from losslens.problems.questions import templates_of
from losslens.rollouts.frozen import FrozenRollouts, load_rollouts, seen_questions
from losslens.rollouts.sample import held_out_rollouts
from losslens.rollouts.token_ids import read_rollouts
from losslens.runs.recorded import Trust, data_of, model_of, rollouts_of


@dataclass(frozen=True)
class TeacherForced:
    """Held-out completions, or the bare reference answers to the same prompts.

    Attributes:
        frozen: The rollouts with the completions.
        answer_only: True if the bare reference answer follows the prompt, as in arXiv 2606.23740, instead of the
            completion.
    """

    frozen: FrozenRollouts
    answer_only: bool

    @cached_property
    def rows(self) -> Any:
        """The correct rollouts; incorrect ones are no target for a model."""
        return self.frozen.table[self.frozen.table["reward"] > 0]

    @property
    def key(self) -> list[Any]:
        """The identity of these sequences, for cache keys."""
        return [self.frozen.identity, self.answer_only]

    def tokens(self, tokenizer: Any) -> Sequences:
        """Returns the token ids of prompts and completions."""
        prompts, completions = read_rollouts(self.rows, tokenizer, self.frozen.manifest)
        if self.answer_only:
            completions = [encode_completion(tokenizer, answer, False) for answer in self.rows["answer"]]
        return Sequences(prompts, completions)


def probe_set(
    settings: ProbeSet, output_dir: Path, run: RunFacts | None, trust: Trust, model_path: str | None = None
) -> FrozenRollouts:
    """Loads the completions named in `settings`, or samples them from the runs' policy on held-out problems.

    Args:
        settings: The settings of the probe set.
        output_dir: The folder with the frozen rollouts.
        run: The manifest of the first run; None without runs.
        trust: What the manifests may request.
        model_path: The base, if it was moved since training.

    Raises:
        UnavailableError: The completions cannot be sampled.
        InputError: They are damaged, were used for training, or too few of them are correct.
    """
    if settings.completions is not None:
        frozen = load_rollouts(settings.completions, "probe_set.completions")
        _require_held_out(frozen, output_dir, run)
    elif run is None:
        raise UnavailableError("external adapters do not record their training data; give probe_set.completions=FOLDER")
    else:
        config = run.config
        try:
            rollout_config = RolloutConfig(
                output_dir=output_dir,
                data=data_of(config.data.model_dump(), trust),
                model=model_of(config.model.model_dump(), trust),
                rollouts=rollouts_of(config.rollouts),
            )
        except ValidationError as error:
            raise UnavailableError(
                "the runs were made by another version of LossLens; give probe_set.completions=FOLDER"
            ) from error
        model = rollout_config.model
        if model_path is not None and model_path != model.path:
            model = model.model_copy(update={"path": model_path, "revision": None, "package": None})
        # The server and its key come from this command line only.
        server = {"base_url": settings.base_url, "api_key_env": settings.api_key_env}
        server_config = rollout_config.rollouts.server.model_copy(update=server)
        rollouts = rollout_config.rollouts.model_copy(update={"server": server_config})
        rollout_config = rollout_config.model_copy(update={"rollouts": rollouts, "model": model})
        frozen = held_out_rollouts(rollout_config, settings.problems, may_ask=settings.base_url is not None)
    correct = frozen.table[frozen.table["reward"] > 0]
    if len(correct) < 4:
        raise InputError(f"{frozen.folder}: at least 4 correct completions are needed, but there are {len(correct)}")
    if ((correct["completion"] == "") & ~correct["finished"]).any():
        raise InputError(f"{frozen.folder}: a completion is empty")
    return frozen


def _require_held_out(frozen: FrozenRollouts, output_dir: Path, run: RunFacts | None) -> None:
    training = output_dir / "rollouts" / run.rollouts.folder if run and run.rollouts else None
    if training is None or not training.is_dir():
        return  # the training rollouts are not available
    trained_on = seen_questions(load_rollouts(training))
    prompts = frozen.table.drop_duplicates("prompt")
    templates = templates_of(frozen.manifest.get("identity"))
    seen = [
        prompt
        for prompt, problem_id in zip(prompts["prompt"], prompts["problem_id"], strict=True)
        if trained_on.has(prompt, templates, problem_id)
    ]
    if seen:
        raise InputError(
            f"probe_set.completions={frozen.folder}: the runs were trained on {len(seen)} of its problems, "
            f"for example {' '.join(seen[0].split())[:60]!r}"
        )
