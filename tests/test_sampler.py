"""Log-probabilities of the policy that sampled the rollouts: from sampling through the frozen rollouts to the batch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from losslens.config.data import Server
from losslens.core.completions import Completion, Journal
from losslens.core.errors import InputError
from losslens.core.files import read_json, write_json
from losslens.core.hashing import hash_json
from losslens.losses import Batch, Loss, Need
from losslens.losses.pairs import PairLoss
from losslens.models.loading import LoadedModel
from losslens.models.tokens import encode_prompt, read_server_completion
from losslens.problems.reasoning_gym import ReasoningGym
from losslens.rollouts.frozen import FrozenRollouts, freeze, load_rollouts, logps_sha256
from losslens.rollouts.sample import frozen_rollouts, rollouts_identity
from losslens.sampling.local import generate_greedy, generate_samples
from losslens.sampling.server import Decoding, Request, ask
from losslens.training.batches import Examples, tokenise
from tests.conftest import frozen_source, served_by
from tests.test_tokens import config, train
from tests.test_trainers import first_step, trainer_of

NEEDED: dict[str, Need] = {"sampled": "sampler", "raw": "sampler_raw"}


class Ratio(Loss):
    """−π_θ/μ of each token, with the distribution that was sampled from or the raw one; remembers its batches."""

    name: Literal["ratio"]
    divide_by: Literal["sampled", "raw"] = "sampled"
    behaviour: Literal["sampler", "base"] = "sampler"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference", NEEDED[self.divide_by]} if self.behaviour == "sampler" else {"reference"})

    def terms(self, batch: Batch) -> Tensor:
        BATCHES.append(batch)
        sampler = batch.sampler if self.behaviour == "sampler" else batch.reference
        assert sampler is not None
        return -(batch.logps - sampler).exp()


class PairRatio(PairLoss):
    """−log of the ratios, of pairs."""

    name: Literal["pair_ratio"]

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"sampler"})

    def terms(self, batch: Batch) -> Tensor:
        assert batch.sampler is not None
        chosen, rejected = batch.split_pairs((batch.logps - batch.sampler).sum(dim=1))
        return rejected - chosen


BATCHES: list[Batch] = []
RATIO = Ratio(name="ratio")


# From sampling


def nucleus(logps: Tensor, top_p: float) -> Tensor:
    """Log-probabilities renormalised over the fewest tokens whose probabilities sum to `top_p` or more."""
    ordered, order = logps.sort(descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = torch.zeros_like(logps, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logps.masked_fill(outside, -math.inf).log_softmax(-1)


@pytest.fixture(scope="module")
def prompts(source: ReasoningGym) -> list[str]:
    return [problem.prompt for problem in source.problems("eval", 6, seed=4)]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.5, 0.9)])
def test_what_is_recorded_is_the_distribution_sampled_from(
    base: LoadedModel, prompts: list[str], temperature: float, top_p: float
) -> None:
    """For each token, from a forward pass of the whole completion, some truncated, in batches of several lengths."""
    options: dict[str, Any] = {"samples": 2, "max_new_tokens": 40, "batch_size": 5, "seed": 3}
    options |= {"temperature": temperature, "top_p": top_p}
    groups = generate_samples(base.model, base.tokenizer, prompts, **options, record_logps=True)
    plain = generate_samples(base.model, base.tokenizer, prompts, **options)
    assert [[c.ids for c in group] for group in groups] == [[c.ids for c in group] for group in plain]
    assert {c.sampler_logps for group in plain for c in group} == {None}
    assert {c.finished for group in groups for c in group} == {True, False}
    for prompt, group in zip(prompts, groups, strict=True):
        prompt_ids = encode_prompt(base.tokenizer, prompt)
        for completion in group:
            ids = list(completion.ids)
            assert len(completion.sampler_logps) == len(completion.sampler_raw_logps) == len(ids)
            with torch.no_grad():
                logits = base.model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1].double()
            raw = logits.log_softmax(-1)
            sampled = nucleus((logits / temperature).log_softmax(-1), top_p)
            for found, expected in ((completion.sampler_raw_logps, raw), (completion.sampler_logps, sampled)):
                own = expected.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
                assert found == pytest.approx(own.tolist(), abs=2e-4)


def test_greedy_completions_have_none(base: LoadedModel, prompts: list[str]) -> None:
    [completion] = generate_greedy(base.model, base.tokenizer, prompts[:1], max_new_tokens=8, batch_size=1)
    assert (completion.sampler_logps, completion.sampler_raw_logps) == (None, None)


@pytest.mark.fast
def test_a_journal_keeps_them_and_reads_one_without_them(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    logged = Completion("7", 2, True, None, (5, 2), (3,), (-0.1, float(np.float32(-1 / 3))), (-0.2, 0.0))
    journal = Journal(file)
    journal.add({"a": logged})
    journal.close()
    assert Journal(file).completions == {"a": logged}
    before = {name: value for name, value in asdict(logged).items() if "logps" not in name}
    entry = {"key": "b", **before}
    with file.open("a") as lines:
        lines.write(json.dumps({**entry, "sha256": hash_json(entry, 16)}) + "\n")
    assert Journal(file).completions == {"a": logged, "b": Completion("7", 2, True, None, (5, 2), (3,))}
    del entry["ids"]
    file.write_text(json.dumps({**entry, "sha256": hash_json(entry, 16)}) + "\n")
    with pytest.raises(InputError, match="line 1 is damaged"):
        Journal(file)


# From a server

IDS, LOGPROBS = [30, 31, 2], [-0.5, -1, 1e-7]
CROOKED: dict[str, list[Any]] = {
    "too few": [-0.5, -1.0], "too many": [*LOGPROBS, -1.0], "none": [], "nan": [-0.5, math.nan, -1.0],
    "infinite": [-0.5, -math.inf, -1.0], "text": [-0.5, "low", -1.0], "null": [-0.5, None, -1.0],
    "positive": [-0.5, 0.3, -1.0], "stand-in": [-0.5, -9999.0, -1.0], "true": [-0.5, True, -1.0], "list": [[-0.5]] * 3,
    "probabilities": [0.6, 0.4, 1.0], "huge": [-0.5, -(10**400), -1.0],
}  # fmt: skip


@pytest.fixture(scope="module")
def logging_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    answer = {"text": "ab", "finish_reason": "stop", "token_ids": IDS, "prompt_token_ids": [3]}
    answers = {name: [{**answer, "logprobs": values}] * 99 for name, values in {"honest": LOGPROBS, **CROOKED}.items()}
    answers["no ids"] = [{**answer, "token_ids": ["none"], "logprobs": LOGPROBS}]
    file = tmp_path_factory.mktemp("answers") / "answers.json"
    file.write_text(json.dumps(answers))
    with served_by("ids_server", file) as url:
        yield url


def answer_to(url: str, prompt: str, decoding: Decoding, model: str = "m", token_ids: str = "auto") -> Completion:
    settings = dict.fromkeys(("requests_per_minute", "price_prompt", "price_completion", "extra_body"))
    server = Server(
        base_url=url, model=model, api_key_env="NO_SUCH_KEY", concurrency=1, attempts=1, timeout=20,
        token_ids=token_ids, **settings,
    )  # fmt: skip
    kept: dict[str, Completion] = {}
    ask("rollouts.server", server, model, {"a": Request(prompt, 1)}, decoding, kept.__setitem__, "answers")
    return kept["a"]


def test_a_servers_are_raw_and_those_sampled_from_only_if_it_samples_so(logging_server: str) -> None:
    raw = (-0.5, -1.0, 0.0)  # at most 0
    whole = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1}
    for temperature, top_p, extra_body, sampled in [
        (1.0, 1.0, whole, raw),
        (1.0, 1.0, {"chat_template_kwargs": {"enable_thinking": False}, "seed": None, **whole}, raw),
        (0.7, 1.0, {**whole, "temperature": 1.0}, raw),
        (1.0, 1.0, {}, None),  # the model's generation_config.json may truncate
        (1.0, 1.0, {"top_k": -1, "min_p": 0.0}, None),
        (0.7, 1.0, whole, None),
        (1.0, 0.95, whole, None),
        (1.0, 1.0, {**whole, "temperature": 0.7}, None),
        (1.0, 1.0, {**whole, "temperature": None}, None),  # the server's default
        (1.0, 1.0, {**whole, "top_k": 20}, None),
        (1.0, 1.0, {**whole, "logit_bias": {"5": -1}}, None),
        (1.0, 1.0, {**whole, "repetition_penalty": 1.05}, None),
        (1.0, 1.0, {**whole, "xtc_probability": 0.5}, None),  # anything that is not known to leave it alone
    ]:
        decoding = Decoding(temperature, top_p, 8, extra_body, logps=True)
        completion = answer_to(logging_server, "honest", decoding)
        assert (completion.ids, completion.sampler_raw_logps) == (tuple(IDS), raw)
        assert completion.sampler_logps == sampled, (temperature, top_p, extra_body)


@pytest.mark.parametrize("prompt", [*CROOKED, "no ids"])
def test_what_is_not_one_log_probability_for_each_token_is_dropped(logging_server: str, prompt: str) -> None:
    completion = answer_to(logging_server, prompt, Decoding(1.0, 1.0, 8, logps=True))
    assert (completion.text, completion.ids) == ("ab", None if prompt == "no ids" else tuple(IDS))
    assert (completion.sampler_logps, completion.sampler_raw_logps) == (None, None)


@pytest.mark.parametrize(
    ("model", "token_ids", "logps", "has_ids"),
    [
        ("m", "auto", False, True),
        ("m", "off", True, False),
        ("unlogged", "auto", True, True),  # asked again without logprobs
        ("strict", "auto", True, False),  # and then without token ids
    ],
)
def test_a_server_that_is_not_asked_or_refuses(
    logging_server: str, model: str, token_ids: str, logps: bool, has_ids: bool
) -> None:
    completion = answer_to(logging_server, "honest", Decoding(1.0, 1.0, 8, logps=logps), model, token_ids)
    assert completion.text == "ab"
    assert (completion.ids is not None) == has_ids
    assert completion.sampler_raw_logps is None


def test_an_end_token_that_the_server_omits_has_none(base: LoadedModel) -> None:
    ids = base.tokenizer("<>1</>", add_special_tokens=False)["input_ids"]
    logps = tuple(-float(i) for i in range(len(ids)))
    whole = Completion("<>1</>", None, True, None, (*ids, 2), None, None, (*logps, -1.0))
    assert read_server_completion(base.tokenizer, "hi", whole).sampler_raw_logps == (*logps, -1.0)
    without_end = Completion("<>1</>", None, True, None, tuple(ids), None, logps, logps)
    read = read_server_completion(base.tokenizer, "hi", without_end)
    assert (read.ids, read.sampler_logps, read.sampler_raw_logps) == ((*ids, 2), None, None)
    truncated = Completion("<>1</>", None, False, None, tuple(ids), None, logps, logps)
    assert read_server_completion(base.tokenizer, "hi", truncated).sampler_logps == logps
    other_text = Completion("<>2</>", None, False, None, tuple(ids), None, logps, logps)
    assert read_server_completion(base.tokenizer, "hi", other_text).sampler_logps is None


# In the frozen rollouts


def with_logps(rollouts: pd.DataFrame, base: LoadedModel, shift: float = 0.0) -> pd.DataFrame:
    """The rollouts of the tests with token ids, and numbers in place of log-probabilities; the last row has none."""
    ids = tokenise(rollouts, base.tokenizer)["completion_ids"]
    logps = [[-(row + place / 100 + shift) for place in range(len(each))] for row, each in enumerate(ids)]
    raw = [[value - 0.5 for value in each] for each in logps]
    columns = {
        "completion_ids": list(ids),
        "sampler_logps": [*logps[:-1], None],
        "sampler_raw_logps": [*raw[:-1], None],
    }
    return rollouts.assign(**columns)


@pytest.fixture
def logged(rollouts: pd.DataFrame, base: LoadedModel, tmp_path: Path) -> Path:
    return freeze(
        with_logps(rollouts, base), tmp_path / "rollouts", "test", {"policy": "test", "identity": {"seed": 0}}
    )


def rewrite(folder: Path, **columns: Any) -> None:
    """Changes columns of the table, and the manifest's hash of the log-probabilities."""
    table = pq.read_table(folder / "rollouts.parquet")
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.list_(pa.float32())))
    pq.write_table(table, folder / "rollouts.parquet")
    frame = pd.DataFrame({name: table[name].to_pandas() for name in ("sampler_logps", "sampler_raw_logps")})
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), "logps_sha256": logps_sha256(frame)})


def test_they_change_neither_the_hash_nor_the_name_of_the_folder(
    rollouts: pd.DataFrame, base: LoadedModel, logged: Path, tmp_path: Path
) -> None:
    table = with_logps(rollouts, base)
    plain = freeze(table.drop(columns=["sampler_logps", "sampler_raw_logps"]), tmp_path / "plain", "test", {})
    assert plain.name == logged.name
    assert "logps_sha256" not in read_json(plain / "manifest.json")
    names = pq.read_table(plain / "rollouts.parquet").column_names[:-2]  # as of before
    pq.write_table(pq.read_table(plain / "rollouts.parquet").select(names), plain / "rollouts.parquet")
    without, found = load_rollouts(plain), load_rollouts(logged)
    assert without.identity == found.identity
    assert list(without.table.columns) == list(found.table.columns)
    assert {*without.table["sampler_logps"], *without.table["sampler_raw_logps"]} == {None}
    for name in ("sampler_logps", "sampler_raw_logps"):
        assert found.table[name].iloc[-1] is None
        for values, expected in zip(found.table[name][:-1], table[name][:-1], strict=True):
            assert values.dtype == np.float32
            assert values.tolist() == pytest.approx(expected, rel=1e-6)


def test_those_of_the_first_sampling_are_kept(
    rollouts: pd.DataFrame, base: LoadedModel, logged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same settings without a word, as they differ by rounding; of others with one."""
    before = (logged / "rollouts.parquet").read_bytes()
    other = with_logps(rollouts, base, shift=0.25)
    assert freeze(other, logged.parent, "test", {"keys": ["a"], "identity": {"seed": 0}}) == logged
    assert capsys.readouterr().out == ""
    assert freeze(other, logged.parent, "test", {"keys": ["b"], "identity": {"seed": 1}}) == logged
    assert "other settings sampled the same rollouts before" in capsys.readouterr().out
    assert (logged / "rollouts.parquet").read_bytes() == before
    assert load_rollouts(logged).manifest["keys"] == ["a", "b"]


class TestDamage:
    @pytest.mark.parametrize("name", ["sampler_logps", "sampler_raw_logps"])
    def test_a_changed_number(self, logged: Path, name: str) -> None:
        manifest = read_json(logged / "manifest.json")
        values = [None if cell is None else cell.tolist() for cell in load_rollouts(logged).table[name]]
        values[3][2] -= 1e-3
        rewrite(logged, **{name: values})
        load_rollouts(logged)
        write_json(logged / "manifest.json", manifest)
        with pytest.raises(
            InputError, match=r"parquet: the log-probabilities of the sampler have changed .*logps_sha256"
        ):
            load_rollouts(logged)

    def test_missing_columns_or_hash(self, logged: Path) -> None:
        table, manifest = pq.read_table(logged / "rollouts.parquet"), read_json(logged / "manifest.json")
        pq.write_table(table.drop_columns(["sampler_logps"]), logged / "rollouts.parquet")
        with pytest.raises(InputError, match="the log-probabilities of the sampler have changed"):
            load_rollouts(logged)
        pq.write_table(table, logged / "rollouts.parquet")
        del manifest["logps_sha256"]
        write_json(logged / "manifest.json", manifest)
        with pytest.raises(InputError, match="the log-probabilities of the sampler have changed"):
            load_rollouts(logged)

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ([-1.0], "sampler_logps has 1 numbers for"),
            ([math.nan], "sampler_logps contains a number that is not a log-probability"),
            ([None], "sampler_logps contains a number that is not a log-probability"),
            ([-math.inf], "sampler_logps contains a number that is not a log-probability"),
            ([0.5], "sampler_logps contains a number that is not a log-probability"),
        ],
    )
    def test_numbers_that_are_none_whatever_the_hash(self, logged: Path, values: list[Any], told: str) -> None:
        table = load_rollouts(logged).table
        cells = [None if cell is None else cell.tolist() for cell in table["sampler_logps"]]
        cells[1] = values if told.endswith("for") else [*values, *cells[1][1:]]
        rewrite(logged, sampler_logps=cells)
        with pytest.raises(InputError, match=rf"rollouts\.parquet: row 2: {told}"):
            load_rollouts(logged)

    def test_log_probabilities_without_token_ids(
        self, rollouts: pd.DataFrame, base: LoadedModel, tmp_path: Path
    ) -> None:
        folder = freeze(with_logps(rollouts, base).assign(completion_ids=None), tmp_path, "test", {})
        with pytest.raises(InputError, match=r"row 1: sampler_logps has \d+ numbers for no completion_ids"):
            load_rollouts(folder)


# In training


@pytest.mark.parametrize("loss", [RATIO, PairRatio(name="pair_ratio", pairs="all")], ids=lambda loss: loss.name)
def test_they_stand_where_the_tokens_of_their_rollout_are_scored(
    loss: Loss, rollouts: pd.DataFrame, base: LoadedModel
) -> None:
    """Column t scores token t + 1; the second row's prompt is empty, so that nothing scores its first token."""
    table = tokenise(with_logps(rollouts, base)[:24], base.tokenizer)
    table.at[1, "prompt_ids"] = []
    examples = Examples(table, loss)
    batch = examples.collate(pad_token_id=0)
    expected = torch.zeros(batch["labels"].shape[0], batch["labels"].shape[1] - 1)
    for place, row in enumerate(examples.rows.T.reshape(-1)):
        start = len(table["prompt_ids"][row])
        for number in range(len(table["completion_ids"][row])):
            if start + number:
                expected[place, start + number - 1] = -(row + number / 100)
    assert torch.allclose(batch["sampler"], expected, atol=1e-5)
    assert torch.equal(batch["sampler"].ne(0), batch["labels"][:, 1:].ne(-100) & expected.ne(0))
    assert "sampler" not in Examples(table, Ratio(name="ratio", behaviour="base")).collate(pad_token_id=0)


def test_they_are_kept_only_with_the_ids_that_they_were_sampled_with(
    rollouts: pd.DataFrame, base: LoadedModel, tmp_path: Path
) -> None:
    table = with_logps(rollouts, base)[:3]
    known = tokenise(table, base.tokenizer, {"tokenizer": None})
    assert [values is not None for values in known["sampler_logps"]] == [True] * 3
    as_text = table.assign(completion_ids=pd.Series([None, *table["completion_ids"][1:]], dtype=object))
    assert [v is not None for v in tokenise(as_text, base.tokenizer)["sampler_raw_logps"]] == [False, True, True]
    # Of another tokenizer, in which these ids mean nothing: the text is encoded, and one id more or less is another.
    foreign = table.assign(completion_ids=[[9, *ids[1:]] for ids in table["completion_ids"]])
    assert {*tokenise(foreign, base.tokenizer)["sampler_logps"]} == {None}
    unended = table.assign(completion_ids=[ids[:-1] for ids in table["completion_ids"]], finished=True)
    read = tokenise(unended, base.tokenizer, {"tokenizer": {"sha256": "another", "ends": {"999": "<end>"}}})
    assert read["completion_ids"].tolist() == table["completion_ids"].tolist()  # the base's end token is added
    assert {*read["sampler_logps"]} == {None}


def refusal(loss: Loss, table: pd.DataFrame, tokenised: pd.DataFrame, make_plan: Any) -> str:
    source = frozen_source(make_plan(loss, batch_size=2), tokenised)
    with pytest.raises(InputError) as error:
        source.require_sampler(FrozenRollouts(Path("outputs/rollouts/x"), table, {}))
    return str(error.value)


def test_rollouts_without_them_are_refused_with_the_reason(
    rollouts: pd.DataFrame, base: LoadedModel, make_plan: Any
) -> None:
    table = load_frame(with_logps(rollouts, base))[:12]
    raw = Ratio(name="ratio", divide_by="raw")
    tokenised = tokenise(table, base.tokenizer)
    frozen_source(make_plan(RATIO, batch_size=2), tokenised).require_sampler(FrozenRollouts(Path("x"), table, {}))
    base_instead = r"; method.behaviour=base divides by the base's instead"
    start = "method=ratio: the rollouts in outputs/rollouts/x have no log-probabilities of the policy that sampled them"
    none = [None] * len(table)

    def told(loss: Loss, **columns: Any) -> str:
        changed_table = table.assign(**columns)
        return refusal(loss, changed_table, tokenise(changed_table, base.tokenizer), make_plan)

    assert told(RATIO, completion_ids=none) == f"{start} (only their text is known, not their token ids){base_instead}"
    unrecorded = f"{start} (none were recorded when they were sampled){base_instead}"
    assert told(RATIO, sampler_logps=none, sampler_raw_logps=none) == unrecorded
    assert told(raw, sampler_raw_logps=none) == unrecorded
    server = "their server reports only those at temperature 1 without truncation, and may have sampled otherwise"
    raw_instead = "; method.behaviour=sampler_raw divides by these"
    assert told(RATIO, sampler_logps=none) == f"{start} ({server}){raw_instead}"
    foreign = [[9, *ids[1:]] for ids in table["completion_ids"]]
    tokenizer = f"{start} (their token ids belong to a different tokenizer){base_instead}"
    assert told(RATIO, completion_ids=foreign) == tokenizer
    some = [*table["sampler_logps"][:-1], None]
    assert told(RATIO, sampler_logps=some).startswith("method=ratio: 1 of 12 rollouts in outputs/rollouts/x have no ")
    assert told(PairRatio(name="pair_ratio", pairs="all"), completion_ids=none).endswith("not their token ids)")
    other = frozen_source(
        make_plan(Ratio(name="ratio", behaviour="base"), batch_size=2), tokenised.assign(sampler_logps=none)
    )
    other.require_sampler(FrozenRollouts(Path("x"), table, {}))


def load_frame(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of lists as they are loaded."""
    return table.astype({"completion_ids": object, "sampler_logps": object, "sampler_raw_logps": object})


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)])
def test_in_the_first_step_the_sampler_is_the_base(
    temperature: float, top_p: float, base: LoadedModel, make_plan: Any, tmp_path: Path
) -> None:
    """Of rollouts that the base sampled, the raw ones are the reference, and the others are it, warped alike."""
    settings = config(tmp_path, f"rollouts.temperature={temperature}", f"rollouts.top_p={top_p}")
    rollouts = frozen_rollouts(settings)
    tokenised = tokenise(rollouts.table, base.tokenizer, rollouts.manifest)
    assert rollouts.manifest["logps_sha256"] == logps_sha256(rollouts.table)
    for loss in (RATIO, Ratio(name="ratio", divide_by="raw")):
        plan = make_plan(loss, batch_size=8)
        frozen_source(plan, tokenised).require_sampler(rollouts)
        with trainer_of(plan, base, tokenised, tmp_path) as trainer:
            BATCHES.clear()  # that of the check that not every weight is 0
            [batch] = first_step(trainer)
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
            with torch.no_grad():
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                logits = trainer.model(**inputs).logits[:, :-1]
        [scored] = BATCHES
        assert scored.mask.sum() > 100
        assert scored.sampler.masked_fill(scored.mask, 0).eq(0).all()
        if loss.divide_by == "raw" or (temperature, top_p) == (1.0, 1.0):
            expected = scored.reference
        else:
            warped = nucleus((logits.double() / temperature).log_softmax(-1), top_p)
            expected = warped.gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None]).squeeze(-1)
            assert (expected - scored.reference)[scored.mask].abs().max() > 0.1
        assert torch.allclose(scored.sampler[scored.mask].double(), expected[scored.mask].double(), atol=2e-4)
        assert torch.allclose(scored.logps, scored.reference, atol=2e-4)


METHOD = ["method._target_=tests.test_sampler.Ratio", "method.name=ratio", "optim.max_steps=1"]


def test_a_run_needs_them_or_is_told_so(tmp_path: Path) -> None:
    """One of rollouts from before ends in one line; with `behaviour=base` the same rollouts do."""
    outcome = train(tmp_path, *METHOD)
    assert outcome.state == "completed", outcome
    settings = config(tmp_path)
    folder = frozen_rollouts(settings).folder
    identity = rollouts_identity(settings)
    rewrite(folder, sampler_logps=[None] * 16, sampler_raw_logps=[None] * 16)
    write_json(
        folder / "manifest.json", {k: v for k, v in read_json(folder / "manifest.json").items() if k != "logps_sha256"}
    )
    assert (frozen_rollouts(settings).folder, rollouts_identity(settings)) == (folder, identity)
    assert train(tmp_path, *METHOD).state == "skipped"  # the run stays the same one
    outcome = train(tmp_path, *METHOD, "seed=43")
    assert (outcome.state, outcome.exit_status) == ("failed", 2)
    assert outcome.error == (
        f"method=ratio: the rollouts in {folder} have no log-probabilities of the policy that sampled them (none were"
        " recorded when they were sampled); method.behaviour=base divides by the base's instead"
    )
    assert train(tmp_path, *METHOD, "method.behaviour=base").state == "completed"


def test_those_of_a_server_reach_the_rollouts(tmp_path: Path) -> None:
    """A server that serves what the base sampled at temperature 1; and what it says of a lower temperature is raw."""
    table = frozen_rollouts(config(tmp_path / "local")).table
    answers: dict[str, list[dict[str, Any]]] = {}
    for row in table.itertuples():
        answer = {"text": row.completion, "finish_reason": "stop" if row.finished else "length"}
        answer |= {"token_ids": list(row.completion_ids), "prompt_token_ids": list(row.prompt_ids)}
        answers.setdefault(row.prompt, []).append({**answer, "logprobs": row.sampler_raw_logps.tolist()})
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    served = ["rollouts.engine=openai", "rollouts.server.concurrency=1"]
    whole = "rollouts.server.extra_body={top_k: -1, min_p: 0, repetition_penalty: 1}"
    with served_by("ids_server", tmp_path / "answers.json") as url:
        served.append(f"rollouts.server.base_url={url}")
        for model, *more in (
            ["a", whole], ["b", whole, "rollouts.temperature=0.7"], ["c", "rollouts.server.logprobs=off"], ["d"],
        ):  # fmt: skip
            settings = config(tmp_path / model, *served, f"rollouts.server.model={model}", *more)
            found = frozen_rollouts(settings).table
            assert found["completion_ids"].tolist() == table["completion_ids"].tolist()
            for name in ("sampler_logps", "sampler_raw_logps"):
                if model == "c" or (model in "bd" and name == "sampler_logps"):
                    assert {*found[name]} == {None}
                else:
                    assert all(map(np.array_equal, found[name], table["sampler_raw_logps"]))
