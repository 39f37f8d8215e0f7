"""Catalogue of wrong inputs: `make bad-input` prints it, and docs/reference/bad_input.md shows it.

Each is a command line as a user types it in a folder that holds only what `files` puts there. The command must refuse
it in one line that names the field or the file and says what is allowed (tests/test_bad_input.py).
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

STUDENT = Path(__file__).parents[2] / "src" / "losslens" / "tiny" / "student"
MODULE = "model.layers.0.self_attn.q_proj"

Files = Callable[[Path], None]


@dataclass(frozen=True)
class BadInput:
    """A wrong input.

    Attributes:
        line: The command line after `losslens`, as typed into a shell.
        names: The field, file or word that the refusal names.
        says: What it says of it: what is wrong, or what is allowed.
        files: Creates the files that the line needs, in the current folder; None if it needs none.
        needs: What the folder holds, in words; empty without `files`.
    """

    line: str
    names: str
    says: str
    files: Files | None = None
    needs: str = ""

    @property
    def arguments(self) -> list[str]:
        """The arguments of the command."""
        return shlex.split(self.line)

    @property
    def shown(self) -> str:
        """The command line for tables; long words are shortened."""
        words = [word if len(word) <= 90 else f"{word[:40]}…{word[-10:]}" for word in self.line.split(" ")]
        return f"losslens {' '.join(words)}"


def text(name: str, content: str | bytes) -> Files:
    """A file with this content."""

    def make(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def several(*files: Files) -> Files:
    """The files of all of these."""

    def make(folder: Path) -> None:
        for each in files:
            each(folder)

    return make


def rows(name: str, *content: dict[str, Any]) -> Files:
    """A file of JSON lines."""
    return text(name, "".join(f"{json.dumps(row)}\n" for row in content))


def model(name: str, **config: Any) -> Files:
    """A copy of the embedded student with these values in its config.json."""

    def make(folder: Path) -> None:
        copy = shutil.copytree(STUDENT, folder / name)
        content = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        (copy / "config.json").write_text(json.dumps(content | config), encoding="utf-8")

    return make


def pickled_model(name: str) -> Files:
    """The student with its weights as a pickle."""

    def make(folder: Path) -> None:
        model(name)(folder)
        (folder / name / "model.safetensors").unlink()
        (folder / name / "pytorch_model.bin").write_bytes(b"\x80\x04N.")

    return make


def adapter(name: str, rank: int = 2, out: int = 8, module: str = MODULE, **config: Any) -> Files:
    """A LoRA adapter of one module, with these values in its adapter_config.json."""

    def make(folder: Path) -> None:
        (folder / name).mkdir(parents=True)
        content = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
        (folder / name / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
        generator = np.random.default_rng(len(name))
        tensors = {
            f"base_model.model.{module}.lora_{factor}.weight": generator.normal(size=shape).astype(np.float32)
            for factor, shape in (("A", (rank, 8)), ("B", (out, rank)))
        }
        save_file(tensors, folder / name / "adapter_model.safetensors")

    return make


def run(content: str, file: str = "status.json") -> Files:
    """The folder of a run in which one file has this content, and the status is `completed`."""
    folder = "outputs/main/sft-conventional-r8-tiny-s42-01234567"
    return several(text(f"{folder}/status.json", '{"state": "completed"}'), text(f"{folder}/{file}", content))


def _long(letter: str) -> str:
    return letter * 240


_PROBLEMS = rows("p.jsonl", *({"prompt": f"What is {n} + 1?", "answer": n + 1} for n in range(20)))
_ROWS = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "reward": n % 2} for n in range(8)]
_FILE = "train data=file rollouts.policy=base"
_AAA = f"{'a' * 64}!.q_proj"
_DEEP = "[" * 100_000

_OF_THE_PROGRAM = (
    BadInput("trian", "trian", "did you mean losslens train?"),
    BadInput("method=sft", "method=sft", "the command comes first"),
    BadInput("-m method=sft,dpo", "-m", "the command comes first"),
)

_WORDS_OF_TRAIN = (
    BadInput("train method=foo", "method=foo", "method takes one of"),
    BadInput("train method=SFT", "method=SFT", "did you mean method=sft?"),
    BadInput("train metod=sft", "metod", "did you mean method?"),
    BadInput("train method", "method", "key=value"),
    BadInput("train =3", "=3", "key=value"),
    BadInput("train 'sweep=a(b'", "sweep=a(b", "unbalanced brackets"),
    BadInput("train method=sft,dpo", "method=sft,dpo", "add -m"),
    BadInput("train -m method=sft,DPO", "method=DPO", "did you mean method=dpo?"),
    BadInput("train learning_rate=1e-4", "learning_rate", "did you mean lr.peak?"),
    BadInput("train lr=1e-4", "lr=1e-4", "did you mean lr.peak=1e-4?"),
    BadInput("train lora_rank=8", "lora_rank=8", "did you mean lora_rank=r8?"),
    BadInput("train model=Qwen/Qwen3-0.6B", "model=Qwen/Qwen3-0.6B", "did you mean model.path=Qwen/Qwen3-0.6B?"),
    BadInput("train data=problems.jsonl", "data=problems.jsonl", "did you mean data=file data.path=problems.jsonl?"),
    BadInput("train experiment=smollm", "experiment=smollm", "did you mean experiment=smollm2?"),
    BadInput("train logger=tensorboard", "logger=tensorboard", "logger takes one of none, wandb"),
    BadInput("train optim.maxsteps=3", "optim.maxsteps", "did you mean optim.max_steps?"),
    BadInput("train nokey=1", "nokey", "there is no nokey"),
    BadInput("train method.beta=0.1", "method.beta", "is no option of method=sft"),
    BadInput("train data.path=x.jsonl", "data.path", "did you mean data=file data.path=x.jsonl?"),
    BadInput("train benchmark=gsm8k,aime26", "benchmark=gsm8k,aime26", "several values are a list"),
    BadInput("train pairs=all", "pairs=all", "there is no pairs"),
    BadInput("train -m experiment=dpo_beta method=SFT", "method=SFT", "did you mean method=sft?"),
    BadInput("evaluate benchmark=gsm8k experiment=smollm2_cpu", "sweep=smollm2_cpu", "no such sweep"),
    BadInput("train -m method=sft,dpo model.path=/no/such/model", "model.path=/no/such/model", "no such folder"),
    BadInput("train --config-dir nowhere", "--config-dir nowhere", "no such folder"),
    BadInput("train --watch", "--watch", "unrecognized arguments"),
)

_OLD_NAMES = (
    BadInput("train optim.warmup=0.1", "optim.warmup", "called optim.warmup_ratio now"),
    BadInput("train rollouts.k=4", "rollouts.k", "called rollouts.samples_per_prompt now"),
    BadInput("train data.train=10", "data.train", "called data.train_size now"),
    BadInput("train lr.base=1e-4", "lr.base", "called lr.peak now"),
    BadInput("train -m lr.pairwise_factor=1,0.1", "lr.pairwise_factor", "called lr.factor now"),
    BadInput("train logger.references=auto", "logger.references", "called weight_tracking.references now"),
    BadInput("train train_on=dpo_rows", "train_on=dpo_rows", "called train_on=paired_rollouts now"),
    BadInput("train experiment=dpo_rows", "experiment=dpo_rows", "called experiment=paired_rollouts now"),
    BadInput("analyze at=100", "at", "called checkpoint now"),
    BadInput("analyze top=5", "top", "called num_directions now"),
    BadInput("analyze held_out.problems=9", "held_out.problems", "called probe_set.problems now"),
)

_VALUES_OF_TRAIN = (
    BadInput("train optim.max_steps=many", "optim.max_steps", "valid integer"),
    BadInput("train optim.max_steps=0", "optim.max_steps", "greater than or equal to 1"),
    BadInput("train optim.max_steps=10000000000000000000000", "optim.max_steps", "less than or equal to 1000000000"),
    BadInput("train optim.max_steps=1.5", "optim.max_steps", "valid integer"),
    BadInput("train optim.epochs=1e300", "optim.epochs", "less than or equal to"),
    BadInput("train optim.max_steps=100000000", "max_steps=100000000", "at most 1,000,000,000 rows"),
    BadInput("train optim.epochs=0", "optim.epochs", "greater than 0"),
    BadInput("train optim.batch_size=4 optim.micro_batch=3", "micro_batch=3", "does not divide batch_size=4"),
    BadInput("train optim.save_steps=7", "log_steps=5", "does not divide save_steps=7"),
    BadInput("train optim.scheduler=foo", "optim.scheduler", "'cosine'"),
    BadInput("train optim.warmup_ratio=1", "optim.warmup_ratio", "less than 1"),
    BadInput("train lr.peak=-0.001", "lr.peak", "greater than 0"),
    BadInput("train lr.peak=inf", "lr.peak", "finite number"),
    BadInput("train lr.peak=nan", "lr.peak", "finite number"),
    BadInput("train 'lr.peak=${nowhere}'", "nowhere", "lr.peak"),
    BadInput("train 'output_dir=${oc.env:NOT_SET_ANYWHERE}'", "NOT_SET_ANYWHERE", "not found"),
    BadInput("train lora_rank.r=0", "lora_rank.r", "greater than or equal to 1"),
    BadInput("train lora_rank.r=1e3x", "lora_rank.r", "valid integer"),
    BadInput("train lora_rank.dropout=1", "lora_rank.dropout", "less than 1"),
    BadInput("train lora_rank.alpha=-inf", "lora_rank.alpha", "finite number"),
    BadInput("train lora_rank=null", "lora_rank", "takes one of"),
    BadInput("train adapter=full", "adapter", "'lora' or 'none'"),
    BadInput("train seed=-1", "seed", "greater than or equal to 0"),
    BadInput("train seed=4294967296", "seed", "less than 4294967296"),
    BadInput("train model.dtype=float8", "model.dtype", "'float32'"),
    BadInput("train model.device=tpu", "model.device", "'cuda'"),
    BadInput("train model.target_modules=[]", "model.target_modules", "at least 1 item"),
    BadInput("train model.target_modules=[nope]", "no module is called nope", "the linear modules are"),
    BadInput("train 'model.chat_options={a b: 1}'", "model.chat_options", "pattern"),
    BadInput("train data.train_size=0", "data.train_size", "greater than or equal to 1"),
    BadInput("train data.eval_size=-1", "data.eval_size", "greater than or equal to 0"),
    BadInput("train data.source.task=nothing", "source.task=nothing", "no such task"),
    BadInput("train 'data.source.difficulty={nope: 1}'", "source.difficulty", "nope"),
    BadInput("train data.source.reads=mind", "source.reads", "answer_tag"),
    BadInput("train data.source._target_=os.system", "data.source._target_", "class"),
    BadInput("train data.source._target_=nowhere.Problems", "data.source._target_", "nowhere"),
    BadInput("train method._target_=losslens.losses.sft.Nope", "method._target_", "Nope"),
    BadInput("train rollouts.temperature=0", "rollouts.temperature", "greater than 0"),
    BadInput("train rollouts.top_p=2", "rollouts.top_p", "less than or equal to 1"),
    BadInput("train rollouts.policy=me", "rollouts.policy", "'teacher' or 'base'"),
    BadInput("train rollouts.accept=true", "rollouts.accept", "all_incorrect"),
    BadInput("train rollouts.engine=openai", "engine=openai", "rollouts.server.model=NAME"),
    BadInput(
        "train rollouts.engine=vllm rollouts.server.command=/no/vllm", "rollouts.server.command", "no such program"
    ),
    BadInput("train rollouts.server.base_url=ftp://x/v1", "rollouts.server.base_url", "http://localhost:8000/v1"),
    BadInput("train rollouts.server.base_url=http://me:pw@x/v1", "rollouts.server.base_url", "must not contain a user"),
    BadInput("train rollouts.server.price_prompt=1", "price_prompt", "set both or neither"),
    BadInput("train evaluation.max_tokens=0", "evaluation.max_tokens", "greater than or equal to 1"),
    BadInput("train benchmark=arithmetic benchmark.arithmetic.eval_size=0", "eval_size=0", "no problems to score on"),
    BadInput("train logger.project=a/b", "logger.project", "pattern"),
    BadInput("train logger.mode=maybe", "logger.mode", "'offline' or 'online'"),
    BadInput("train weight_tracking.references=none", "weight_tracking.references", "'auto'"),
    BadInput(
        "train 'weight_tracking.references={a: nowhere}'",
        "nowhere",
        "neither a finished run of the sweep nor a PEFT folder",
    ),
    BadInput("train resources.gpus=2", "resources.gpus=2", "torchrun"),
    BadInput("train workers=0 -m method=sft,dpo", "hydra.launcher.workers", "at least 1"),
    BadInput("train hydra/launcher=slum", "hydra/launcher=slum", "did you mean hydra/launcher=slurm?"),
    BadInput("train hydra/launcher=slurm resources.time=soon", "resources", "D-HH:MM:SS"),
    BadInput(
        "train hydra/launcher=slurm 'resources.sbatch={array: 1}'", "resources.sbatch", "array is set by LossLens"
    ),
    BadInput(
        "train hydra/launcher=slurm 'resources.partition=\"gpu\ntouch made #\"'", "resources.partition", "one line"
    ),
    BadInput(
        "train hydra/launcher=slurm 'resources.sbatch={reservation: \"a\ntouch made #\"}'",
        "resources.sbatch",
        "one line",
    ),
)

_NAMES_AND_PATHS = (
    BadInput("train sweep=../x", "sweep", "must start with a letter or digit"),
    BadInput("train sweep=/tmp/x", "sweep", "must start with a letter or digit"),
    BadInput("train sweep=rollouts", "sweep", "reserved folder of output_dir"),
    BadInput("train 'sweep=\"\"'", "sweep", "must start with a letter or digit"),
    BadInput("train 'sweep=\"a\nb\"'", "sweep", "must start with a letter or digit"),
    BadInput(f"train -m method=sft,dpo sweep={_long('s')}", "sweep", "at most 100 characters"),
    BadInput("train output_dir=", "output_dir", "empty path"),
    BadInput("train output_dir=~nobody-here/x", "output_dir", "no such home folder"),
    BadInput("train output_dir=file/below", "file/below", "Not a directory", text("file", ""), "an empty `file`"),
    BadInput("train 'output_dir=\"a\nb\"'", "output_dir", "control character"),
    BadInput("train model.name=a/../../up", "model.name", "must start with a letter or digit"),
    BadInput(f"train model.name={_long('m')}", "model.name", "at most 100 characters"),
    BadInput(f"train data.name={_long('d')}", "data.name", "at most 100 characters"),
    BadInput("train method.name=../../up", "method.name", "name"),
    BadInput("train model.path=nowhere rollouts.policy=base", "model.path=nowhere", "no local copy"),
    BadInput("train model.path=./nowhere rollouts.policy=base", "model.path=./nowhere", "no such folder"),
    BadInput("train model.path= rollouts.policy=base", "model.path", "empty path"),
    BadInput("train model.path=m", "rollouts.policy=base", "model.teacher=", model("m"), "a model in `m`"),
    BadInput(
        "train model.path=m rollouts.policy=base",
        "model.path=m",
        "no config.json",
        text("m/x", ""),
        "a folder `m` without a model",
    ),
    BadInput(
        "train model.path=m rollouts.policy=base",
        "model.path=m",
        "JSON",
        text("m/config.json", _DEEP),
        "`m/config.json` of 100,000 brackets",
    ),
    BadInput(
        "train model.path=m rollouts.policy=base",
        "model.path=m",
        "safetensors",
        pickled_model("m"),
        "a model whose weights are a pickle",
    ),
    BadInput(
        "train model.path=m rollouts.policy=base",
        "model.path=m",
        "embedding",
        model("m", vocab_size=20),
        "a model whose tokenizer has more tokens than its embedding",
    ),
    BadInput(
        "train model.path=m rollouts.policy=base",
        "model.trust_remote_code=true",
        "its own code",
        model("m", model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "a model that brings its code",
    ),
    BadInput("train model.teacher=./nowhere", "model.teacher=./nowhere", "no such folder"),
    BadInput("train rollouts.path=nowhere", "nowhere/manifest.json", "no such file"),
    BadInput("train rollouts.path=f", "f/manifest.json", "Not a directory", text("f", "x"), "a file `f`"),
    BadInput(
        "train rollouts.path=r", "r/manifest.json", "no such file", text("r/x", ""), "a folder `r` without rollouts"
    ),
    BadInput("train rollouts.path=r", "r/manifest.json", "JSON", text("r/manifest.json", "{"), "a truncated manifest"),
)

_DATA = (
    BadInput("train data=file", "data.path", "data.path=FILE"),
    BadInput(f"{_FILE} data.path=nowhere.jsonl", "data.path=nowhere.jsonl", "no such file"),
    BadInput(
        f"{_FILE} data.path=d", "data.path=d", "name a parquet or JSON Lines file", text("d/x", ""), "a folder `d`"
    ),
    BadInput(f"{_FILE} data.path=e.jsonl", "e.jsonl", "no rows", text("e.jsonl", ""), "an empty file"),
    BadInput(
        f"{_FILE} data.path=b.jsonl",
        "b.jsonl",
        "one object per line",
        text("b.jsonl", "{\n"),
        "a line that is not JSON",
    ),
    BadInput(f"{_FILE} data.path=z.jsonl", "z.jsonl", "JSON", text("z.jsonl", _DEEP), "100,000 brackets"),
    BadInput(f"{_FILE} data.path=k.jsonl", "k.jsonl", "a pickle", text("k.jsonl", b"\x80\x04N."), "a pickle"),
    BadInput(f"{_FILE} data.path=u.jsonl", "u.jsonl", "UTF-8", text("u.jsonl", b'{"prompt": "\xe9"}\n'), "latin-1"),
    BadInput(f"{_FILE} data.path=p.parquet", "p.parquet", "parquet", text("p.parquet", "PAR1"), "a cut parquet file"),
    BadInput(
        f"{_FILE} data.path=q.jsonl",
        "q.jsonl",
        "data.source.columns.prompt=question",
        rows("q.jsonl", {"question": "1 + 1", "answer": 2}),
        "problems under `question`",
    ),
    BadInput(
        f"{_FILE} data.path=l.jsonl",
        "l.jsonl",
        "row 1",
        rows("l.jsonl", *({"prompt": ["a"], "answer": n} for n in range(4))),
        "lists as prompts",
    ),
    BadInput(
        f"{_FILE} data.path=t.jsonl data.eval_size=0",
        "t.jsonl",
        "reward",
        rows("t.jsonl", *({**row, "reward": "yes"} for row in _ROWS)),
        "rewards in words",
    ),
    BadInput(
        f"{_FILE} data.path=p.jsonl data.train_size=1000",
        "data.train_size=1000",
        "data.train_size=null uses all",
        _PROBLEMS,
        "20 problems",
    ),
    BadInput(
        f"{_FILE} data.path=p.jsonl data.source.template=x", "source.template", "{question}", _PROBLEMS, "20 problems"
    ),
    BadInput(
        f"{_FILE} data.path=p.jsonl data.source.verifier=os.nope", "source.verifier", "nope", _PROBLEMS, "20 problems"
    ),
    BadInput(
        "train data=gsm8k data.source.repo=h rollouts.policy=base",
        "README.md",
        "outside the repository",
        text("h/README.md", "---\nconfigs:\n- config_name: main\n  data_files: /etc/passwd\n---\n"),
        "a data set that names a file outside",
    ),
    BadInput(
        "train data=gsm8k 'data.source.answer_pattern=\"(\"' rollouts.policy=base", "source.answer_pattern", "missing )"
    ),
    BadInput(
        "train data=gsm8k 'data.source.answer_pattern=\"((x{9999}){9999})\"' rollouts.policy=base",
        "source.answer_pattern",
        "too many repeats",
    ),
    BadInput("train data=gsm8k data.source.repo=../x/y rollouts.policy=base", "source.repo=../x/y", "no such folder"),
    BadInput("train data=gsm8k data.source.repo=json rollouts.policy=base", "source.repo=json", "not a dataset"),
)

_OF_ROLLOUT = (
    BadInput("rollout method=dpo", "method=dpo", "belongs to"),
    BadInput("rollout rollouts.samples_per_prompt=0", "rollouts.samples_per_prompt", "greater than or equal to 1"),
    BadInput("rollout output_dir=''", "output_dir", "empty path"),
    BadInput("rollout seed=3", "seed", "belongs to"),
)

_OF_EVALUATE = (
    BadInput("evaluate", "benchmark", "benchmark=gsm8k"),
    BadInput("evaluate benchmark=nothing", "benchmark=nothing", "benchmark takes one of"),
    BadInput("evaluate benchmark=arithmetic", "sweep=main", "no such sweep"),
    BadInput("evaluate benchmark=arithmetic sweep=../x", "sweep", "must start with a letter or digit"),
    BadInput("evaluate benchmark=arithmetic evaluation.temperature=-1", "evaluation.temperature", "greater than 0"),
    BadInput("evaluate benchmark=file data.path=x.jsonl", "data.path=x.jsonl", "benchmark.file.eval_path=x.jsonl"),
    BadInput("evaluate benchmark=arithmetic", "status.json", "no valid state", run("[]"), "a run whose status is `[]`"),
    BadInput("evaluate benchmark=arithmetic", "manifest.json", "JSON", run("{", "manifest.json"), "a cut manifest"),
)

_OF_ANALYZE = (
    BadInput("analyze", "sweep=main", "no such sweep"),
    BadInput("analyze sweep=a/b", "sweep", "must start with a letter or digit"),
    BadInput("analyze sweep=[]", "sweep", "at least 1 item"),
    BadInput("analyze method=dpo", "method=dpo", "analyze has no option method"),
    BadInput("analyze pairs=some", "pairs", "'reference'"),
    BadInput("analyze pairs=[[a]]", "pairs", "'reference'"),
    BadInput("analyze checkpoint=middle", "checkpoint", "'end'"),
    BadInput("analyze target_norm=1", "target_norm=1", "requires checkpoint=norm"),
    BadInput("analyze num_directions=0", "num_directions", "greater than or equal to 1"),
    BadInput("analyze equivalence_margin=100", "equivalence_margin", "less than 100"),
    BadInput("analyze connectivity.points=2", "connectivity.points", "greater than or equal to 3"),
    BadInput("analyze cka.pooling=max", "cka.pooling", "'mean' or 'last'"),
    BadInput("analyze interventions.restoring=[99]", "interventions.restoring=99", "at most num_directions=10"),
    BadInput("analyze interventions.merging=[soup]", "interventions.merging", "'ties'"),
    BadInput("analyze answer_copies=1", "answer_copies=1", "at least 2"),
    BadInput("analyze sweep=null", "sweep=null", "adapters={name: folder, …}"),
    BadInput("analyze sweep=null 'adapters={a: nowhere, b: nowhere}'", "nowhere", "no such folder"),
    BadInput("analyze sweep=null 'adapters={a/b: x}'", "adapters", "must start with a letter or digit"),
    BadInput("analyze sweep=null 'adapters={a: a, b: b}' checkpoint=5", "checkpoint=5", "use end"),
    BadInput("analyze probe_set.base_url=nowhere", "probe_set.base_url", "http://localhost:8000/v1"),
    BadInput("analyze", "status.json", "no valid state", run('{"state": "won"}'), "a run in the state `won`"),
    BadInput("analyze", "manifest.json", "JSON", run(_DEEP, "manifest.json"), "a manifest of 100,000 brackets"),
    BadInput("analyze", "manifest.json", "no such file", run("", "x"), "a completed run without a manifest"),
)

_OF_COMPARE = (
    BadInput("compare", "ADAPTER", "required"),
    BadInput("compare ''", "ADAPTER", "no folder and no hub id"),
    BadInput("compare nowhere elsewhere", "nowhere", "not a hub id"),
    BadInput("compare a=", "a=", "no folder and no hub id"),
    BadInput("compare a a", "a", "given twice", adapter("a"), "an adapter `a`"),
    BadInput(
        "compare '../x=a' b",
        "../x",
        "must start with a letter or digit",
        several(adapter("a"), adapter("b")),
        "adapters `a`, `b`",
    ),
    BadInput(
        "compare '=1+2=a' b --measures cosines",
        "=1+2",
        "must start with a letter or digit",
        several(adapter("a"), adapter("b")),
        "adapters `a`, `b`",
    ),
    BadInput(
        "compare d d2", "d: ", "adapter", several(text("d/x", ""), text("d2/x", "")), "folders without an adapter"
    ),
    BadInput("compare a b --measures some", "--measures", "'cosines'"),
    BadInput(
        "compare a b --precision int8",
        "--precision",
        "needs --measures cosines",
        several(adapter("a"), adapter("b")),
        "adapters `a`, `b`",
    ),
    BadInput("compare a b --completions c", "--completions", "needs --base"),
    BadInput("compare a b --base ''", "--base", "names no model"),
    BadInput(
        "compare a b --base ./nowhere",
        "./nowhere",
        "no such folder",
        several(adapter("a"), adapter("b")),
        "adapters `a`, `b`",
    ),
    BadInput(
        "compare a b --output-dir ''",
        "--output-dir",
        "empty path",
        several(adapter("a"), adapter("b")),
        "adapters `a`, `b`",
    ),
    BadInput(
        "compare a b --measures cosines --output-dir ''",
        "--output-dir",
        "empty path",
        several(adapter("a"), adapter("b")),
        "adapters `a`, `b`",
    ),
    BadInput(
        "compare a b --output-dir a/adapter_config.json",
        "adapter_config.json",
        "not a folder",
        several(adapter("a"), adapter("b")),
        "adapters `a`, `b`",
    ),
    BadInput("compare --published nowhere", "nowhere", "not a hub id"),
    BadInput(
        "compare --published p", "p: ", "no adapter_config.json", text("p/x", ""), "a folder `p` without adapters"
    ),
    BadInput(
        "compare a b",
        "peft_type=IA3",
        "only LORA",
        several(adapter("a"), adapter("b", peft_type="IA3")),
        "an IA³ adapter `b`",
    ),
    BadInput(
        "compare a b",
        "b/adapter_config.json",
        "lora_alpha",
        several(adapter("a"), adapter("b", lora_alpha=1e308)),
        "lora_alpha=1e308",
    ),
    BadInput(
        "compare a b",
        "rank_pattern",
        "rank",
        several(adapter("a"), adapter("b", rank_pattern={"q_proj": -1})),
        "a negative rank",
    ),
    BadInput(
        "compare a b",
        "b/adapter_config.json: alpha_pattern",
        "too long to match",
        several(adapter("a", module=_AAA), adapter("b", module=_AAA, alpha_pattern={"(a|aa)+$": 2})),
        "an expression in `alpha_pattern` that never ends",
    ),
    BadInput(
        "compare a b",
        "b/adapter_config.json: rank_pattern",
        "too many repeats",
        several(adapter("a"), adapter("b", rank_pattern={"((x{999}){999}){999}": 2})),
        "10⁹ repeats in `rank_pattern`",
    ),
    BadInput(
        "compare a b",
        "init_lora_weights=pissa",
        "convert",
        several(adapter("a"), adapter("b", init_lora_weights="pissa")),
        "a PiSSA adapter `b`",
    ),
    BadInput(
        "compare a b", "DoRA", "--base FOLDER", several(adapter("a"), adapter("b", use_dora=True)), "a DoRA adapter `b`"
    ),
    BadInput(
        "compare a b",
        "b: ",
        "cannot be compared",
        several(adapter("a"), adapter("b", out=12)),
        "adapters of unlike shapes",
    ),
    BadInput(
        "compare a b",
        "adapters.b",
        "different base",
        several(
            adapter("a", base_model_name_or_path="x/one", revision="1" * 40),
            adapter("b", base_model_name_or_path="x/two", revision="2" * 40),
        ),
        "adapters of two bases",
    ),
    BadInput(
        "compare a b",
        "b/adapter_model.bin",
        "pickle",
        several(
            adapter("a"),
            text("b/adapter_config.json", '{"lora_alpha": 4, "r": 2}'),
            text("b/adapter_model.bin", b"\x80\x04N."),
        ),
        "pickled weights",
    ),
    BadInput(
        "compare a b",
        "b",
        "not a readable PEFT adapter",
        several(adapter("a"), adapter("b"), text("b/adapter_model.safetensors", b"\xff" * 20)),
        "damaged weights",
    ),
)

_OF_TOOLS = (
    BadInput("status", "sweep=main", "no such sweep"),
    BadInput("status sweep=", "sweep=", "sweep=…"),
    BadInput("status sweep=../x", "sweep=../x", "name of a folder in outputs", text("x/y", ""), "`x` beside `outputs`"),
    BadInput("status runs=3", "runs=3", "takes sweep=…, output_dir=…"),
    BadInput("status --bogus", "--bogus", "unrecognized arguments"),
    BadInput("status output_dir=~nobody-here/x", "output_dir=~nobody-here/x", "no such home folder"),
    BadInput("sync", "sweep=main", "no such sweep"),
    BadInput("sync parallel=0", "parallel=0", "at least 1"),
    BadInput("sync parallel=²", "parallel=²", "at least 1"),
    BadInput("sync sweep=../x", "sweep=../x", "name of a folder in outputs", text("x/y", ""), "`x` beside `outputs`"),
    BadInput("sync sweep", "sweep", "sweep=…"),
    BadInput("dashboard sweep=nothing", "sweep=nothing", "no such sweep"),
    BadInput(
        "dashboard sweep=../x --dry-run",
        "sweep=../x",
        "name of a folder in outputs",
        text("x/y", ""),
        "`x` beside `outputs`",
    ),
    BadInput("dashboard project=a/b --dry-run", "project=a/b", "W&B", run("{}", "manifest.json"), "a sweep"),
    BadInput("migrate output_dir=nowhere", "output_dir=nowhere", "no such folder"),
    BadInput("migrate sweep=../x", "sweep=../x", "name of a folder in outputs"),
    BadInput("migrate sweep=..", "sweep=..", "name of a folder in outputs", text("outputs/x", ""), "`outputs`"),
    BadInput("migrate sweep=nothing", "sweep=nothing", "no such sweep"),
    BadInput(
        "migrate losses=nowhere.Loss",
        "losses=nowhere.Loss",
        "not a subclass",
        run("{}", "manifest.json"),
        "a sweep `main`",
    ),
    BadInput("slurm wobble", "wobble", "it takes one of up, down, status, pipeline"),
    BadInput("slurm up a b", "one folder", "quoted if need be"),
    BadInput("slurm pipeline method=foo", "method=foo", "method takes one of"),
    BadInput("slurm pipeline sweep=../x", "sweep", "must start with a letter or digit"),
)

CATALOGUE: dict[str, tuple[BadInput, ...]] = {
    "losslens": _OF_THE_PROGRAM,
    "train: words": _WORDS_OF_TRAIN,
    "train and analyze: earlier names": _OLD_NAMES,
    "train: values": _VALUES_OF_TRAIN,
    "train: names, paths, models, rollouts": _NAMES_AND_PATHS,
    "train: problems": _DATA,
    "rollout": _OF_ROLLOUT,
    "evaluate": _OF_EVALUATE,
    "analyze": _OF_ANALYZE,
    "compare": _OF_COMPARE,
    "status, sync, dashboard, migrate, slurm": _OF_TOOLS,
}


def catalogue() -> Iterator[BadInput]:
    """All wrong inputs."""
    for inputs in CATALOGUE.values():
        yield from inputs


if __name__ == "__main__":
    for title, inputs in CATALOGUE.items():
        print(f"\n{title}\n")
        for each in inputs:
            beside = f"   [{each.needs}]" if each.needs else ""
            print(f"  {each.shown!r}{beside}\n      {each.names} … {each.says}")
    print(f"\n{sum(map(len, CATALOGUE.values()))} wrong inputs")
