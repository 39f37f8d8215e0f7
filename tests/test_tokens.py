"""Training uses the sampled token ids; rollouts that exist only as text are encoded."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from tokenizers import processors
from torch.nn import Linear
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.core.completions import Completion, Journal
from losslens.core.errors import InputError
from losslens.losses.dpo import Dpo
from losslens.losses.sft import Sft
from losslens.models import adapters
from losslens.models.loading import LoadedModel, load_tokenizer, preserved, source_of
from losslens.models.tokens import (
    chat_turns,
    declare_ends,
    encode_completion,
    encode_prompt,
    read_server_completion,
    render_prompt,
    tokenizer_fingerprint,
)
from losslens.pipeline.preflight import require_fit
from losslens.pipeline.train_job import Outcome, train_job
from losslens.rollouts.frozen import SCHEMA, freeze, load_rollouts
from losslens.rollouts.sample import frozen_rollouts, require_limits
from losslens.rollouts.token_ids import read_rollouts
from losslens.runs.spec import RunSpec
from losslens.training import batches
from losslens.training.batches import tokenise, tokenise_frozen
from losslens.training.run import make_trainer
from tests.conftest import ROOT, TINY, base_source, frozen_source, served_by

STUDENT = TINY / "student"
SMALL = [
    "data.train_size=8", "data.eval_size=0", "rollouts.policy=base", "rollouts.samples_per_prompt=2",
    "rollouts.max_tokens=48",
    "optim.max_steps=2", "optim.batch_size=4", "logger=none",
]  # fmt: skip


def config(output_dir: Path, *overrides: str) -> TrainConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(TrainConfig, compose("train", [f"output_dir={output_dir}", *SMALL, *overrides]))


def train(output_dir: Path, *overrides: str) -> Outcome:
    return train_job(config(output_dir, *overrides))


def adapter(output_dir: Path, *overrides: str) -> bytes:
    outcome = train(output_dir, *overrides)
    assert outcome.state == "completed", outcome
    [file] = output_dir.glob(f"main/{outcome.run}/adapter/adapter_model.safetensors")
    return file.read_bytes()


def rollouts_of(output_dir: Path) -> pd.DataFrame:
    [folder] = (output_dir / "rollouts").glob("[!.]*-*")
    return load_rollouts(folder).table


def changed(folder: Path, **files: dict[str, Any]) -> Path:
    """The tiny student with other values in its JSON files."""
    shutil.copytree(STUDENT, folder)
    for name, changes in files.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def two_ends(folder: Path) -> Path:
    """Its tokenizer calls <|endoftext|> the end, its turns end with <|im_end|>, and generation stops at both."""
    ends = {"eos_token_id": [2, 0]}
    return changed(folder, tokenizer_config={"eos_token": "<|endoftext|>"}, generation_config=ends, config=ends)


def special(folder: Path) -> Path:
    """Its tokenizer calls a token special that stands inside every completion."""
    tokens = json.loads((STUDENT / "tokenizer.json").read_text())["added_tokens"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return changed(
        folder, tokenizer={"added_tokens": [*tokens, {"id": 267, "content": "answer", "special": True, **flags}]}
    )


@contextmanager
def answering(folder: Path, table: pd.DataFrame) -> Iterator[str]:
    """A server that gives the completions of `table`, as vLLM gives them."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for row in table.itertuples():
        reason = "stop" if row.finished else "length"
        ids = {"token_ids": row.completion_ids, "prompt_token_ids": row.prompt_ids}
        answers.setdefault(row.prompt, []).append({"text": row.completion, "finish_reason": reason, **ids})
    (folder / "answers.json").write_text(json.dumps(answers))
    with served_by("ids_server", folder / "answers.json") as url:
        yield url


def test_another_end_token_than_eos_gives_the_same_adapter(tmp_path: Path) -> None:
    plain = adapter(tmp_path / "plain")
    table = rollouts_of(tmp_path / "plain")
    assert {ids[-1] for ids, end in zip(table["completion_ids"], table["finished"], strict=True) if end} == {2}
    assert table["finished"].any()
    other = [f"model.path={two_ends(tmp_path / 'two_ends')}", "model.name=two_ends"]
    assert adapter(tmp_path / "process", *other) == plain
    served = [*other, "rollouts.engine=openai", "rollouts.server.concurrency=1"]
    with answering(tmp_path, table) as url:
        served.append(f"rollouts.server.base_url={url}")
        assert adapter(tmp_path / "ids", *served, "rollouts.server.model=m") == plain
        assert adapter(tmp_path / "refused", *served, "rollouts.server.model=strict") == plain
        assert adapter(tmp_path / "text", *served, "rollouts.server.model=n", "rollouts.server.token_ids=off") == plain
    assert rollouts_of(tmp_path / "ids")[["prompt_ids", "completion_ids"]].equals(
        table[["prompt_ids", "completion_ids"]]
    )
    for without in ("refused", "text"):
        assert rollouts_of(tmp_path / without)["completion_ids"].isna().all()
    mine = table[["problem_id", "prompt", "completion", "reward", "finished", "sample"]]
    mine.to_parquet(tmp_path / "mine.parquet")
    mine.to_json(tmp_path / "mine.jsonl", orient="records", lines=True)
    for name in ("parquet", "jsonl"):
        data = ["data=file", f"data.path={tmp_path}/mine.{name}", "data.train_size=null", "data.eval_size=0"]
        assert adapter(tmp_path / name, *other, *data) == plain


def test_special_tokens_inside_a_completion_are_kept(tmp_path: Path) -> None:
    asked = config(tmp_path / "out", f"model.path={special(tmp_path / 'special')}", "model.name=special")
    frozen = frozen_rollouts(asked)
    table = frozen.table
    assert table["completion"].str.contains("<answer>").any()
    assert table["reward"].any()
    assert table["tokens"].tolist() == [len(ids) for ids in table["completion_ids"]]
    tokenizer = load_tokenizer(source_of(asked.model))
    assert tokenizer.added_tokens_decoder[267].special
    assert tokenise(table, tokenizer, frozen.manifest)["completion_ids"].tolist() == table["completion_ids"].tolist()


class TestServed:
    @pytest.fixture
    def tokenizer(self, tmp_path: Path) -> Any:
        folder = special(tmp_path / "special")
        return load_tokenizer(base_source(path=str(folder)))

    def completion(self, tokenizer: Any, text: str, **changes: Any) -> Completion:
        ids = tuple(encode_completion(tokenizer, "<answer>1</answer>", True))
        given = {"ids": ids, "prompt_ids": tuple(encode_prompt(tokenizer, "hi")), **changes}
        return read_server_completion(tokenizer, "hi", Completion(text, 1, True, **given))

    @pytest.mark.parametrize("text", ["<answer>1</answer>", "<>1</>", " <answer>1\n</answer>"])
    def test_the_text_is_decoded_from_the_ids(self, tokenizer: Any, text: str) -> None:
        read = self.completion(tokenizer, text)
        assert read.text == "<answer>1</answer>"
        assert read.ids is not None
        assert read.tokens == len(read.ids)
        without_end = self.completion(tokenizer, text, ids=read.ids[:-1])
        assert without_end.ids == read.ids

    @pytest.mark.parametrize("changes", [{"ids": (30, 30, 2)}, {"ids": (9999, 2)}, {"prompt_ids": (30, 30)}])
    def test_ids_that_do_not_match_the_text_are_dropped(self, tokenizer: Any, changes: Any) -> None:
        read = self.completion(tokenizer, "<>1</>", **changes)
        assert (read.text, read.ids, read.prompt_ids) == ("<>1</>", None, None)


class TestText:
    @pytest.fixture
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(STUDENT)

    def test_order_of_precedence_of_end_tokens(self, tokenizer: Any) -> None:
        tokenizer.eos_token = "<|endoftext|>"
        assert chat_turns(tokenizer).end == 2
        declare_ends(tokenizer, [1, 2])
        assert chat_turns(tokenizer).ends == {0, 1, 2}
        tokenizer.chat_template = None
        assert chat_turns(tokenizer).end == 1
        declare_ends(tokenizer, [1, 0])
        assert chat_turns(tokenizer).end == 0

    @pytest.mark.parametrize(
        "text", ["7", "7<|im_end|>", "7<|im_end|>\n", "7<|im_end|><|endoftext|><|endoftext|>", "7<|endoftext|>"]
    )
    def test_one_end(self, tokenizer: Any, text: str) -> None:
        assert encode_completion(tokenizer, text, True) == [25, 2]

    def test_end_tokens_inside_a_completion_are_kept(self, tokenizer: Any) -> None:
        assert encode_completion(tokenizer, "7<|im_end|>7", True) == [25, 2, 25, 2]
        assert encode_completion(tokenizer, "7\n", True) == [25, 201, 2]
        assert encode_completion(tokenizer, "7", False) == [25]
        assert encode_completion(tokenizer, "7<|im_end|>", False) == [25, 2]
        assert encode_completion(tokenizer, "", True) == [2]

    @pytest.mark.parametrize("cut", ["", "\n", "<|im_start|>assistant\n"])
    def test_a_templated_prompt_is_not_templated_again(self, tokenizer: Any, cut: str) -> None:
        whole = render_prompt(tokenizer, "hi")
        assert render_prompt(tokenizer, whole.removesuffix(cut)) == whole
        with_system = f"<|im_start|>system\nbe brief<|im_end|>\n{whole}"
        assert render_prompt(tokenizer, with_system.removesuffix(cut)) == with_system
        assert render_prompt(tokenizer, "what is <|im_end|>?") != "what is <|im_end|>?"

    @pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
    @pytest.mark.parametrize("template", [True, False])
    def test_bos_once_and_no_eos_before_the_completion(self, tokenizer: Any, bos: str, template: bool) -> None:
        """A tokenizer that puts BOS before and EOS after every text; a template with and without BOS; and none."""
        tokenizer.bos_token = "<|endoftext|>"
        both = processors.TemplateProcessing(
            "<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
        )
        tokenizer.backend_tokenizer.post_processor = both
        assert tokenizer("7")["input_ids"] == [0, 25, 2]
        tokenizer.chat_template = bos + tokenizer.chat_template if template else None
        assert encode_prompt(tokenizer, "7").count(0) == (bool(bos) if template else 1)
        assert encode_prompt(tokenizer, "<|endoftext|>7").count(0) == 1 + (bool(bos) and template)
        if not template:
            assert encode_prompt(tokenizer, "7") == [0, 25]
        elif bos:
            given = render_prompt(tokenizer, "7")
            assert encode_prompt(tokenizer, given) == encode_prompt(tokenizer, given.removeprefix("<|endoftext|>"))
        assert encode_completion(tokenizer, "7", True) == [25, 2]

    def test_encoding_of_texts_is_summarised_in_one_line(
        self, tokenizer: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [
            ("a1", "7<|im_end|>", True),
            (render_prompt(tokenizer, "a2"), "7", True),
            ("a3", "7<|im_start|>7</s>", False),
        ]
        table = pd.DataFrame(rows, columns=["prompt", "completion", "finished"])
        for _ in range(2):
            read_rollouts(table, tokenizer)
        assert capsys.readouterr().out == (
            "rollouts: they have no token ids; 3 of 3 are encoded from their text: 1 get the end token <|im_end|>; "
            "1 already have an end token; 1 are truncated and get none; 1 prompts are already in the chat template; "
            "1 texts contain special tokens, which are encoded as such (first: <|im_start|> in row 3); "
            "1 end with </s>, which is plain text to the base\n"
        )


class TestPrompts:
    """`prompt_text` is trained on if the base has its tokens."""

    def table(self, tokenizer: Any, text: str, ids: bool = True) -> pd.DataFrame:
        given = tokenizer(text)["input_ids"] if ids else None
        row = {"prompt": "hi", "prompt_text": text, "prompt_ids": given, "completion": "7", "finished": True}
        return pd.DataFrame([row | {"completion_ids": [25, 2] if ids else None}])

    def test_prompts_as_rendered_for_sampling(self, base: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
        text = "<|im_start|>system\nbe brief<|im_end|>\n" + render_prompt(base.tokenizer, "hi")
        about = {
            "sha256": tokenizer_fingerprint(base.tokenizer),
            "ends": {"2": "<|im_end|>"},
            "control": ["<|im_end|>"],
        }
        table = self.table(base.tokenizer, text)
        for manifest in ({"tokenizer": about}, {"tokenizer": {**about, "sha256": "another"}}):
            prompts, completions = read_rollouts(table, base.tokenizer, manifest)
            assert (prompts, completions) == (table["prompt_ids"].tolist(), [[25, 2]])
        prompts, _ = read_rollouts(self.table(base.tokenizer, text, ids=False), base.tokenizer, {"tokenizer": about})
        assert prompts == table["prompt_ids"].tolist()
        expected = "the base's own chat template, which is used for scoring, renders them differently"
        assert expected in capsys.readouterr().out

    def test_prompts_with_tokens_that_the_base_lacks(
        self, base: LoadedModel, capsys: pytest.CaptureFixture[str]
    ) -> None:
        about = {"sha256": "another", "ends": {"2": "<|eot|>"}, "control": ["<|eot|>"]}
        table = self.table(base.tokenizer, "<|user|>hi<|eot|>")
        prompts, completions = read_rollouts(table.assign(completion="7 7"), base.tokenizer, {"tokenizer": about})
        assert prompts == [encode_prompt(base.tokenizer, "hi")]
        assert completions == [encode_completion(base.tokenizer, "7 7", True)]
        said = capsys.readouterr().out
        assert "their prompts contain <|eot|>, which is not a token of the base" in said
        assert "their token ids belong to a different tokenizer" in said


def test_prompts_already_in_the_chat_template_are_reported(
    tmp_path: Path, base: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [render_prompt(base.tokenizer, f"{n}") for n in range(30)] + ["plain"]
    rows = [json.dumps({"prompt": prompt, "answer": "1"}) for prompt in prompts]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows) + "\n")
    data = ["data=file", f"data.path={tmp_path}/mine.jsonl", "data.train_size=null", "data.eval_size=0"]
    require_limits(config(tmp_path / "out", *data, "rollouts.engine=openai", "rollouts.server.model=m"))
    assert "prompts are already in the base's chat template; the server will apply" in capsys.readouterr().out


class TestClock:
    TEMPLATE = "{{ strftime_now('%d %b %Y %H:%M:%S %-d') }}" + (STUDENT / "chat_template.jinja").read_text()

    def model(self, folder: Path, template: str = TEMPLATE) -> str:
        changed(folder)
        (folder / "chat_template.jinja").write_text(template)
        return str(folder)

    def test_the_date_is_fixed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = self.model(tmp_path / "dated")
        told = render_prompt(load_tokenizer(base_source(path=path)), "hi")
        assert told.startswith("26 Jul 2024 00:00:00 26<|im_start|>")
        assert "is fixed to 2024-07-26 00:00" in capsys.readouterr().out
        options = json.dumps({"strftime_now": "2031-02-03 04:05:06"})
        told = render_prompt(load_tokenizer(base_source(path=path, chat_options=options)), "hi")
        assert told.startswith("03 Feb 2031 04:05:06 3<|im_start|>")
        with pytest.raises(InputError, match=r"model\.chat_options\.strftime_now=soon: must be a date"):
            load_tokenizer(base_source(path=path, chat_options='{"strftime_now": "soon"}'))

    @pytest.mark.parametrize("drawn", ["{{ [1, 2] | random }}", "{{ lipsum() }}"])
    def test_random_templates_are_refused(self, tmp_path: Path, drawn: str) -> None:
        with pytest.raises(InputError, match=r"model\.path=.*template is random"):
            load_tokenizer(base_source(path=self.model(tmp_path / "drawn", drawn)))


def short(folder: Path) -> Path:
    """GPT-2 with 64 positions and the tiny student's tokenizer."""
    shutil.copytree(STUDENT, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation*"))
    shape = {"n_layer": 1, "n_embd": 32, "n_head": 4, "vocab_size": 319, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=2, pad_token_id=0)).save_pretrained(folder)
    return folder


def larger(folder: Path) -> Path:
    """A tokenizer with three tokens more than the embedding has rows."""
    changed(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["What", "sum", "Compute"])
    tokenizer.save_pretrained(folder)
    return folder


def raising(folder: Path) -> Path:
    changed(folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    return folder


ATTENTION = "model.target_modules=attention"


@pytest.mark.parametrize(
    ("make", "overrides", "told"),
    [
        (short, [ATTENTION], r"rollouts\.max_tokens=48 and the \d+ tokens of the prompt .* exceed the 64 positions"),
        (short, [ATTENTION, "data=file", "data.train_size=null"],
         r"mine\.jsonl: row 2: 1\d\d tokens .* exceed the 64 positions"),
        (larger, ["data=file", "data.train_size=null"], r"mine\.jsonl: row 2: the prompt contains token 319 .*319"),
        (raising, [], r"the chat template fails on .*no users here"),
        (changed, ["model.target_modules=[q_proj,nowhere]"], r"model\.target_modules: no module is called nowhere"),
        (changed, ["model.target_modules=[mlp]"], r"model\.target_modules: "),
        (changed, ["data.eval_size=4", "evaluation.max_tokens=500"],
         r"evaluation\.max_tokens=500 and .* exceed the 512 positions"),
    ],
)  # fmt: skip
def test_limits_of_a_model_are_checked_before_sampling(
    make: Callable[[Path], Path], overrides: list[str], told: str, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "2", "completion": "2", "reward": 1},
        {"prompt": "What is 1?", "completion": "7 " * 60, "reward": 0},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model = [
        f"model.path={make(tmp_path / 'model')}",
        "model.name=mine",
        *[f"data.path={tmp_path}/mine.jsonl"] * ("data=file" in overrides),
    ]
    outcome = train(tmp_path / "out", *model, *overrides)
    assert (outcome.state, outcome.exit_status) == ("failed", 2)
    assert "\n" not in outcome.error
    assert pd.Series([outcome.error]).str.contains(told).all(), outcome.error
    assert not (tmp_path / "out").exists()


def test_jobs_of_a_sweep_share_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    adapters.require_targets.cache_clear()
    for name in ("skeleton", "_with_lora"):
        monkeypatch.setattr(adapters, name, lambda *_, name=name: looked.append(name) or Linear(2, 2))
    monkeypatch.setattr(batches, "tokenise", lambda *args, now=tokenise: looked.append("tokenise") or now(*args))
    mine = tmp_path / "mine.jsonl"
    for completion in ("7", "8"):
        mine.write_text(json.dumps({"prompt": "2", "completion": completion, "reward": 1}) + "\n")
        for seed in (1, 2):
            asked = config(tmp_path, "data=file", f"data.path={mine}", "data.train_size=null", f"seed={seed}")
            require_fit(RunSpec.of(asked))
    assert looked == ["skeleton", "_with_lora", "tokenise", "tokenise"]  # a file is read again when it changed


def test_frozen_rollouts_are_tokenised_once_for_all_runs(
    rollouts: pd.DataFrame, base: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run loads them anew. Others are other rollouts, and the same ones with another tokenizer on either side."""
    few = rollouts.iloc[:4]
    looked, read = [], batches.read_rollouts

    def counted(*arguments: Any) -> Any:
        looked.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(batches, "read_rollouts", counted)
    folder = freeze(few, tmp_path, "first", {})
    first, again = (tokenise_frozen(load_rollouts(folder), base.tokenizer) for _ in range(2))
    assert first is again
    assert len(looked) == 1
    pd.testing.assert_frame_equal(first, tokenise(load_rollouts(folder).table, base.tokenizer, {}))
    other = load_rollouts(freeze(few.assign(completion="1"), tmp_path, "other", {}))
    written = {"tokenizer": {"sha256": "of another", "ends": {}, "control": []}}
    foreign = load_rollouts(freeze(few, tmp_path / "foreign", "first", written))
    copied = copy.copy(base.tokenizer)
    for each, tokenizer in ((other, base.tokenizer), (foreign, base.tokenizer), (load_rollouts(folder), copied)):
        before = len(looked)
        tokenise_frozen(each, tokenizer)
        assert len(looked) == before + 1


@pytest.mark.parametrize(
    ("method", "micro_batch"),
    [(Sft(name="sft"), 2), (Sft(name="sft"), 4), (Dpo(name="dpo"), 2), (Dpo(name="dpo", loss_type="ipo"), 4)],
)
def test_batches_without_completion_tokens_have_loss_zero(
    method: Any, micro_batch: int, base: LoadedModel, tokenised: pd.DataFrame, make_plan: Any, tmp_path: Path
) -> None:
    """A batch without one has loss 0; and a batch that is half so has gradients, in whole or in micro-batches."""
    for share, losses in ((0.95, "hardly"), (0.5, "some")):
        empty = [[] if i < share * len(tokenised) else ids for i, ids in enumerate(tokenised["completion_ids"])]
        table = tokenised.assign(completion_ids=pd.Series(empty, index=tokenised.index, dtype=object))
        plan = make_plan(method, batch_size=4, micro_batch=micro_batch, max_steps=2, log_steps=1)
        with preserved(base.model):
            trainer = make_trainer(plan, base, frozen_source(plan, table), tmp_path / losses, [])
            trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(
            torch.isfinite(torch.tensor([float(entry[name]) for name in ("loss", "grad_norm")])).all() for entry in logs
        )
        if losses == "hardly":
            without = [entry for entry in logs if entry["completion_tokens"] == 0]
            assert without
            assert all(entry["grad_norm"] == 0 for entry in without)
            if getattr(method, "loss_type", "sigmoid") == "sigmoid":
                assert all(entry["loss"] == 0 for entry in without)


def test_with_dropout_the_micro_batch_is_part_of_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(*overrides: str) -> dict[str, Any]:
        return RunSpec.of(config(tmp_path, *overrides)).identity

    assert identity() == identity("optim.micro_batch=2") == identity("optim.gradient_checkpointing=true")
    dropping = identity("lora_rank.dropout=0.1")
    assert dropping["micro_batch"] == 4
    assert dropping == identity("lora_rank.dropout=0.1", "optim.micro_batch=4")
    assert dropping != identity("lora_rank.dropout=0.1", "optim.micro_batch=2")
    assert dropping == identity("lora_rank.dropout=0.1", "optim.gradient_checkpointing=true")
    launched = identity("lora_rank.dropout=0.1", "resources.gpus=2")
    assert (launched["processes"], launched["micro_batch"]) == (2, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched == identity("lora_rank.dropout=0.1")
    assert config(tmp_path).optim.microbatch_plans(dropout=True) == [(4, False), (4, True)]


def test_a_changed_character_in_a_journal_is_detected(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    journal = Journal(file)
    journal.add({"0": Completion("<answer>7</answer>", 3, True, 5, (1, 2), (3,))}, state="abc")
    journal.close()
    whole = file.read_bytes()
    assert Journal(file).completions["0"].ids == (1, 2)
    for old, new in ((b">7<", b">8<"), (b"[1, 2]", b"[1, 3]"), (b'"abc"', b'"abd"'), (b"true", b"null")):
        assert whole.count(old) == 1
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(InputError, match=r"j\.jsonl: line \d is damaged"):
            Journal(file)


def test_journal_entries_without_checksums_are_read(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    before = {"key": "a 0", "text": "7", "tokens": 3, "finished": True, "prompt_tokens": None}
    file.write_text(json.dumps(before) + "\n")
    journal = Journal(file)
    journal.add({"b 0": Completion("8", 1, True, ids=(1,))})
    journal.close()
    kept = {"a 0": Completion("7", 3, True), "b 0": Completion("8", 1, True, ids=(1,))}
    assert Journal(file).completions == kept
    for damaged in ({"text": 7}, {"finished": None}, {"tokens": "3"}, {"ids": None}, {"state": "x"}):
        file.write_text(json.dumps({**before, **damaged}) + "\n")
        with pytest.raises(InputError, match=r"j\.jsonl: line 1 is damaged"):
            Journal(file)


def test_rollouts_without_token_ids_are_read_as_text(rollouts: pd.DataFrame, base: LoadedModel, tmp_path: Path) -> None:
    """A folder without the columns of ids keeps the hash that it was frozen with."""
    import pyarrow.parquet as pq

    from losslens.core.files import read_json, write_json
    from losslens.rollouts.frozen import IDS, content_sha256

    folder = freeze(rollouts, tmp_path, "test", {})
    names = [name for name in SCHEMA.names if name not in IDS]
    pq.write_table(pq.read_table(folder / "rollouts.parquet").select(names), folder / "rollouts.parquet")
    with pytest.raises(InputError, match="the content has changed"):
        load_rollouts(folder)
    old = load_frame(folder)
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), "sha256": content_sha256(old)})
    frozen = load_rollouts(folder)
    assert frozen.table[list(IDS)].isna().all(axis=None)
    assert tokenise(frozen.table, base.tokenizer, frozen.manifest).equals(tokenise(frozen.table, base.tokenizer))


def load_frame(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "rollouts.parquet", dtype_backend="numpy_nullable")
