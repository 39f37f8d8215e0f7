"""How many problems two draws of the data share: their generator is asked, nothing is read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from hydra import compose, initialize_config_dir

from losslens.config import interpolations
from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.rollouts.sample import problem_source
from tools.study.results import CONF


def shared_problems(experiment: str, draws: Sequence[str]) -> dict[str, float]:
    """Returns the share of a draw's training problems that another draw has, too, for each two draws ("0,1").

    Args:
        experiment: Name of the experiment, whose problems they are.
        draws: Values of `data.seed`.
    """
    questions = {draw: _questions(experiment, draw) for draw in draws}
    return {f"{a},{b}": len(questions[a] & questions[b]) / len(questions[a]) for a, b in combinations(draws, 2)}


def _questions(experiment: str, draw: str) -> set[str]:
    interpolations.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = parse(TrainConfig, compose("train", [f"experiment={experiment}", f"data.seed={draw}"])).data
    return {problem.prompt for problem in problem_source(data).problems("train", data.train_size, data.seed)}
