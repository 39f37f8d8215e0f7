"""What a stranger's files may not do, and an audit that is no verdict."""

from __future__ import annotations

from typing import Any

import pytest

from tools.audit import verdict

pytestmark = pytest.mark.fast


def _audited(*ids: str) -> dict[str, Any]:
    return {"name": "a", "version": "1", "vulns": [{"id": name, "fix_versions": ["2"]} for name in ids]}


def test_an_audit_in_which_the_database_knew_no_package_fails() -> None:
    status, lines = verdict([{"name": "a", "skip_reason": "not found"}] * 2)
    assert status == 1
    assert lines == ["audit: the vulnerability database answered about none of 2 packages; nothing was audited"]


def test_an_audit_names_vulnerabilities_and_what_it_did_not_know() -> None:
    assert verdict([_audited()]) == (0, ["audit: 0 known vulnerabilities in 1 packages"])
    status, lines = verdict([_audited("CVE-1"), {"name": "b", "skip_reason": "not found"}])
    assert status == 1
    assert lines[0] == "a 1: CVE-1, mended in 2"
    assert lines[1].endswith("not audited: b")
