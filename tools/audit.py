"""Checks the installed packages against the database of known vulnerabilities: `make audit`.

pip-audit says "No known vulnerabilities found" also if the database knew none of the packages, as behind a mirror that
has only the files. Its report is read instead, so that what was not looked up is never counted as sound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any


def verdict(packages: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Returns the exit status and the lines to print.

    Args:
        packages: The `dependencies` of a report of pip-audit: `name`, and either `version` and `vulns`, each with `id`
            and `fix_versions`, or `skip_reason`.
    """
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        return 1, [
            f"audit: the vulnerability database answered about none of {len(packages)} packages; nothing was audited"
        ]
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, "
        f"mended in {', '.join(found['fix_versions']) or 'no version yet'}"
        for package in audited
        for found in package["vulns"]
    ]
    found = len(lines)
    if skipped:
        lines.append(f"audit: not known to the database, so not audited: {', '.join(skipped)}")
    lines.append(f"audit: {found} known vulnerabilities in {len(audited)} packages")
    return int(found > 0), lines


def main() -> int:
    """Runs pip-audit over the packages of this environment, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="the Python that has pip-audit")
    command = [
        parser.parse_args().python,
        "-m",
        "pip_audit",
        "--progress-spinner=off",
        "--skip-editable",
        "--format=json",
    ]
    done = subprocess.run(
        [*command, "--path", sysconfig.get_path("purelib")], capture_output=True, text=True, check=False
    )
    if not done.stdout.strip():  # the report is written once everything has been looked up
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(
            f"audit: the vulnerability database cannot be reached ({reason[:200]}); nothing was audited",
            file=sys.stderr,
        )
        return 1
    status, lines = verdict(json.loads(done.stdout)["dependencies"])
    print("\n".join(lines), file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
