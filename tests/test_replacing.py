"""One analysis extends the one before it: nothing that was measured is lost, and nothing is ever half there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from losslens.analysis import replacement
from losslens.analysis.pairs import SelectedPairs, extended
from losslens.analysis.replacement import (
    EarlierAnalysis,
    archive_path,
    finish_interrupted_replacement,
    missing_from,
    read_earlier,
    replace_analysis,
    temporary_folder,
)
from losslens.core.errors import InputError
from losslens.core.files import write_json
from tests.conftest import script

QUICK = (
    "probe_set.problems=12", "connectivity.points=3", "connectivity.midpoint_problems=0", "connectivity.resamples=100",
    "rotated_copies=0", "logger=none",
)  # fmt: skip


def facts(*pairs: tuple[str, str], **adapters: str) -> dict[str, Any]:
    return {"adapters": adapters, "measured_pairs": [list(pair) for pair in pairs]}


def written(folder: Path, content: dict[str, Any]) -> EarlierAnalysis:
    write_json(folder / "manifest.json", content)
    return read_earlier(folder)


def put(folder: Path, content: dict[str, Any]) -> bool:
    before = read_earlier(folder)
    with temporary_folder(folder) as new:
        write_json(new / "manifest.json", content)
        return replace_analysis(new, folder, before, keep=bool(missing_from(content, before)))


class TestWhatIsKnown:
    def test_pairs_are_known_by_their_adapters(self) -> None:
        """Of two sweeps the runs have other names; a run that was trained anew is another one."""
        before = EarlierAnalysis({"sft": "1", "dpo": "2", "rft": "3"}, [("sft", "dpo"), ("sft", "rft")])
        assert before.pairs_among({"main/sft": "1", "main/dpo": "2", "main/rft": "4"}) == [("main/sft", "main/dpo")]
        assert before.pairs_among({"sft": "1", "dpo": "9"}) == []

    def test_two_runs_with_one_adapter_stay_two(self) -> None:
        before = EarlierAnalysis({"sft": "1", "rft": "1", "dpo": "2"}, [("rft", "dpo")])
        assert before.pairs_among({"sft": "1", "rft": "1", "dpo": "2"}) == [("rft", "dpo")]

    def test_chosen_pairs_are_extended_in_the_order_of_the_tables(self) -> None:
        names = ("a", "b", "c")
        found = extended(SelectedPairs([("b", "c")], "pairs: only the listed pairs"), names, [("b", "a")])
        assert found.pairs == [("a", "b"), ("b", "c")]
        assert found.left_out.endswith("and the pairs measured before")
        assert extended(SelectedPairs([], "pairs=none"), names, [("a", "b"), ("a", "c"), ("c", "b")]).left_out == ""
        assert extended(SelectedPairs([("a", "b")], "why"), names, [("b", "a")]) == SelectedPairs([("a", "b")], "why")

    @pytest.mark.parametrize("content", ["", "{\x00", '{"adapters": {}, "measured_pairs": [], "content_sha256": "0"}'])
    def test_what_a_damaged_one_has_is_not_known(self, content: str, tmp_path: Path) -> None:
        """It may have measured pairs that the new one would lack without a word."""
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(InputError, match=r"manifest\.json: .*; delete it"):
            read_earlier(tmp_path)

    @pytest.mark.parametrize("content", ["[]", "{}", '{"adapters": 1, "measured_pairs": 2}'])
    def test_what_is_no_analysis_has_nothing(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_text(content)
        assert read_earlier(tmp_path) == EarlierAnalysis()

    def test_what_a_new_one_lacks(self) -> None:
        before = EarlierAnalysis({"a": "1", "b": "2"}, [("a", "b")])
        assert missing_from(facts(("x", "y"), x="1", y="2"), before) == ""
        assert missing_from(facts(a="1"), before) == "1 of its adapters (b)"
        assert missing_from(facts(a="1", b="2"), before) == "connectivity and CKA of 1 of its pairs"


class TestTheFolder:
    def test_one_with_less_keeps_the_other_aside(self, tmp_path: Path) -> None:
        folder = tmp_path / "analysis"
        assert put(folder, facts(("a", "b"), a="1", b="2"))
        (folder / "wandb").mkdir()
        (folder / "notes.md").write_text("mine")
        assert put(folder, facts(("a", "b"), a="1", b="2", c="3"))
        assert (folder / "notes.md").exists()  # of somebody else
        assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["analysis"]
        assert put(folder, facts(a="1"))
        kept = archive_path(folder, {"a": "1", "b": "2", "c": "3"})
        assert kept.name.startswith("analysis-of-3-runs-")
        assert read_earlier(kept).pairs == [("a", "b")]
        assert read_earlier(folder).adapters == {"a": "1"}
        assert (folder / "wandb").exists()

    def test_one_that_was_written_meanwhile_is_not_lost(self, tmp_path: Path) -> None:
        folder = tmp_path / "analysis"
        with temporary_folder(folder) as new:
            write_json(new / "manifest.json", facts(a="1"))
            assert put(folder, facts(("a", "b"), a="1", b="2"))
            assert not replace_analysis(new, folder, EarlierAnalysis(), keep=False)
        assert read_earlier(folder).pairs == [("a", "b")]

    def test_one_that_the_file_system_does_not_show_yet_is_not_lost(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """NFS remembers for a while that there was no such folder; the rename is decided by the server."""
        folder = tmp_path / "analysis"
        exists = Path.exists
        with temporary_folder(folder) as new:
            write_json(new / "manifest.json", facts(a="1"))
            assert put(folder, facts(("a", "b"), a="1", b="2"))
            with monkeypatch.context() as patch:
                patch.setattr(Path, "exists", lambda path: folder not in (path, *path.parents) and exists(path))
                assert not replace_analysis(new, folder, EarlierAnalysis(), keep=False)
        assert read_earlier(folder).pairs == [("a", "b")]

    @pytest.mark.parametrize("after", range(9))
    @pytest.mark.parametrize("content", [facts(a="1"), facts(a="1", b="2", c="3")], ids=["less", "more"])
    def test_killed_at_any_point_one_of_them_is_whole(
        self, content: dict[str, Any], after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "analysis"
        first = facts(a="1", b="2")
        assert put(folder, first)
        (folder / "wandb").mkdir()
        calls = []

        def killed(function: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                calls.append(1)
                if len(calls) > after:
                    raise KeyboardInterrupt
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for step in ("replace", "unlink", "write_text"):
                patch.setattr(Path, step, killed(getattr(Path, step)))
            patch.setattr(replacement.shutil, "rmtree", killed(replacement.shutil.rmtree))
            with contextlib.suppress(KeyboardInterrupt):
                put(folder, content)
        finish_interrupted_replacement(folder)
        there = [read_earlier(path).adapters for path in (folder, archive_path(folder, first["adapters"]))]
        assert there[0] in (first["adapters"], content["adapters"])  # before anything more is put there
        assert len(content["adapters"]) > 2 or first["adapters"] in there
        assert not list(tmp_path.glob("*/.kept-as"))
        assert put(folder, content)
        whole = [read_earlier(path).adapters for path in tmp_path.glob("analysis*") if path.is_dir()]
        assert content["adapters"] in whole
        assert len(content["adapters"]) > 2 or first["adapters"] in whole
        assert list(tmp_path.glob("analysis*/wandb"))

    def test_what_dead_processes_left_is_removed(self, tmp_path: Path) -> None:
        folder = tmp_path / "analysis"
        with temporary_folder(folder) as mine:
            dead = mine.with_name(mine.name.replace(f"-{os.getpid():x}-", "-7fffffff-"))
            dead.mkdir()
            with temporary_folder(folder):
                assert mine.exists()
            assert not dead.exists()
        assert list(tmp_path.glob(".*.tmp")) == []


def test_the_command_extends_what_is_there(sweep: Path) -> None:
    """One pair, another one, then none: the tables have both; a run less, and the whole is kept aside."""
    folder = sweep / "main" / "analysis"
    line = ["analyze.py", f"output_dir={sweep}", *QUICK]
    script(*line, "pairs=[[rft,dpo]]")
    before = pd.read_csv(folder / "connectivity.csv")
    script(*line, "pairs=[[sft,dpo]]")
    script(*line, "pairs=none")
    after = pd.read_csv(folder / "connectivity.csv")
    assert len(after) == 2 * len(before)
    merged = before.merge(after)
    assert len(merged) == len(before)
    assert pd.read_csv(folder / "pairs.csv")["cka_last"].notna().sum() == 2
    [dpo] = (sweep / "main").glob("dpo-*")
    dpo.rename(sweep / "away")
    outcome = script(*line, "pairs=none")
    (sweep / "away").rename(dpo)
    [kept] = (sweep / "main").glob("analysis-of-6-runs-*")
    assert str(kept) in outcome.stdout
    assert (kept / "report.html").exists()
    assert len(pd.read_csv(kept / "connectivity.csv")) == len(after)
    assert not pd.read_csv(folder / "connectivity.csv").shape[0]
    script(*line, "pairs=none")  # with the run again: what was measured of it is there again
    assert len(pd.read_csv(folder / "connectivity.csv")) == len(after)
