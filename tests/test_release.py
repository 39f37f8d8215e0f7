"""A release has one version everywhere, and says what it changed."""

from __future__ import annotations

import re

import pytest

import losslens
from tests.conftest import ROOT
from tools import release_notes

pytestmark = pytest.mark.fast

CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere() -> None:
    assert set(release_notes.versions(ROOT).values()) == {losslens.__version__}
    assert re.findall(r"^## \[(\d\S+)\]", CHANGELOG, re.M)[0] == losslens.__version__


def test_each_release_says_which_identities_it_changed() -> None:
    for version in re.findall(r"^## \[(\d\S+)\]", CHANGELOG, re.M):
        assert release_notes.notes(CHANGELOG, version)


def test_the_notes_are_the_section_of_the_version() -> None:
    newer = "## [1.10.0] - 2027-01-02\n\n**Identities changed:** none.\n\n### Added\n- A.\n"
    changelog = f"# Changelog\n\n## [Unreleased]\n\n{newer}\n## [1.1.0] - 2027-01-01\n\nFirst.\n"
    assert release_notes.notes(changelog, "1.10.0") == "**Identities changed:** none.\n\n### Added\n- A."
    with pytest.raises(ValueError, match=r"^CHANGELOG\.md: 1\.1\.0 has no line \*\*Identities changed:\*\*$"):
        release_notes.notes(changelog, "1.1.0")
    with pytest.raises(ValueError, match=r"^CHANGELOG\.md: no section"):
        release_notes.notes(changelog, "1.1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "give one tag"), (["1.2.3"], "give one tag"), (["v0.0.0"], "v0.0.0: src/losslens/__init__.py has version")],
)
def test_a_wrong_tag_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert release_notes.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_tag_of_this_version_has_notes(capsys: pytest.CaptureFixture[str]) -> None:
    assert release_notes.main([f"v{losslens.__version__}"]) == 0
    assert "**Identities changed:**" in capsys.readouterr().out
