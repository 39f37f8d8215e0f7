"""reasoning-gym problems: reproducible by seed, disjoint splits, verified by the library's own scorer."""

from __future__ import annotations

import pytest

from losslens.core.errors import InputError
from losslens.problems import is_own_source
from losslens.problems.reasoning_gym import Reading, ReasoningGym, final_answer, split_of
from tools import pretrain

pytestmark = pytest.mark.fast


def test_the_same_seed_gives_the_same_problems(source: ReasoningGym) -> None:
    assert source.problems("train", 50, seed=1) == source.problems("train", 50, seed=1)
    assert source.problems("train", 50, seed=1) != source.problems("train", 50, seed=2)
    assert source.problems("train", 50, seed=1)[:20] == source.problems("train", 20, seed=1)


@pytest.mark.slow
def test_splits_share_no_question(source: ReasoningGym) -> None:
    """The default data (seed 0), other seeds of it, and what the tiny models were trained on."""
    pretraining = max(recipe.problems for recipe in pretrain.RECIPES.values())
    sets = {
        "pretrain": {p.prompt for p in source.problems("pretrain", pretraining, pretrain.SEED)},
        "train": {p.prompt for seed in (0, 1) for p in source.problems("train", 600, seed)},
        "eval": {p.prompt for seed in (0, 1, 2) for p in source.problems("eval", 500, seed)},
    }
    assert not sets["pretrain"] & sets["train"]
    assert not sets["pretrain"] & sets["eval"]
    assert not sets["train"] & sets["eval"]
    for split, questions in sets.items():
        assert {split_of(question, pretrain.SHARE) for question in questions} == {split}


def test_problems_are_distinct(source: ReasoningGym) -> None:
    problems = source.problems("eval", 500, seed=0)
    assert len({p.prompt for p in problems}) == len({p.id for p in problems}) == 500


def test_verify(source: ReasoningGym) -> None:
    [problem] = source.problems("eval", 1, seed=0)
    answer = problem.answer
    right = [
        f"<answer>{answer}</answer>",
        f"so <answer> {answer}.0 </answer>",
        f"<answer>x</answer><answer>{answer}</answer>",
    ]
    wrong = [
        "",
        answer,
        "<answer></answer>",
        f"<answer>{answer}1</answer>",
        f"<answer>it is {answer}</answer>",
        f"<answer>{answer}",
    ]
    assert [source.verifier(problem, text).correct for text in right] == [True] * len(right)
    assert [source.verifier(problem, text).correct for text in wrong] == [False] * len(wrong)
    assert source.verifier(problem, right[1]).answer == f"{answer}.0"
    assert source.verifier(problem, "no tags").answer is None


def test_worked_solutions_are_correct(source: ReasoningGym) -> None:
    for problem in source.problems("pretrain", 200, seed=0):
        assert source.verifier(problem, pretrain.worked_solution(problem)).correct


def test_the_template_contains_the_question() -> None:
    source = ReasoningGym("chain_sum", pretrain.DIFFICULTY, template="Sum.\n{question}\nAnswer in tags: {x}")
    prompt = source.problems("train", 1, seed=0)[0].prompt
    assert prompt.startswith("Sum.\nState")
    assert prompt.endswith("=\nAnswer in tags: {x}")


@pytest.mark.parametrize(
    ("reads", "completion", "answer"),
    [
        ("answer_tag", "<answer>1</answer> and <answer>2</answer> 3", "2"),
        ("answer_tag", "the answer is 3", None),
        ("last_number", "3 + 4 = 7. So the answer is 1,007.", "1007"),
        ("last_number", "it is -2.5", "-2.5"),
        ("last_number", "no idea", None),
        ("last_word", "I say: yes.", "yes"),
        ("last_word", "...", None),
    ],
)
def test_final_answer(reads: Reading, completion: str, answer: str | None) -> None:
    assert final_answer(completion, reads) == answer


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"source\.task=no_such_task: reasoning-gym has no such task; similar names: "):
        ReasoningGym("no_such_task", {}).problems("train", 1, seed=0)
    with pytest.raises(InputError, match=r"source\.difficulty\.max_n: chain_sum has no such parameter; it has min_"):
        ReasoningGym("chain_sum", {"max_n": 3}).problems("train", 1, seed=0)
    with pytest.raises(InputError, match="min_terms"):
        ReasoningGym("chain_sum", {"min_terms": 0}).problems("train", 1, seed=0)
    with pytest.raises(InputError, match=r"template must contain \{question\}"):
        ReasoningGym("chain_sum", {}, template="?")
    with pytest.raises(InputError, match="reads must be answer_tag, last_number or last_word"):
        ReasoningGym("chain_sum", {}, reads="first_number")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="set how many"):
        ReasoningGym("chain_sum", {}).problems("train", None, seed=0)
    with pytest.raises(InputError, match=r"only .* distinct problems"):
        ReasoningGym("chain_sum", {"min_terms": 1, "max_terms": 1, "max_digits": 1}).problems("train", 50, seed=0)


def test_only_own_sources_may_be_named_by_a_manifest() -> None:
    own = ("file.File", "hub_dataset.HubDataset", "reasoning_gym.ReasoningGym")
    assert all(is_own_source(f"losslens.problems.{name}") for name in own)
    others = ("fields.InFull", "judges.Judge", "file.ProblemSource", "ProblemSource", "file", "no.Such")
    assert not any(is_own_source(f"losslens.problems.{name}") for name in others)
    assert not any(is_own_source(name) for name in ("os.system", "tests.own_problems.Mine", "File", ""))
