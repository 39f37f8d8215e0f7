"""What a hub id stands for: a commit on the Hugging Face hub, or in the local copy of it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

from losslens.core.errors import InputError, UnavailableError, first_line

RepoType = Literal["model", "dataset"]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_SECONDS = 10.0


def is_hub_id(path: str) -> bool:
    """Whether `path` has the form of a hub id: `name` or `owner/name`."""
    return _HUB_ID.match(path) is not None


@lru_cache(maxsize=32)
def resolve_commit(field: str, repo: str, revision: str | None, repo_type: RepoType = "model") -> str:
    """The commit that `revision` of a repository means: itself when it is one, else as the hub says.

    Where the hub cannot be reached, it is what the local copy was downloaded as.

    Args:
        field: What named the repository, for messages.
        repo: The hub id.
        revision: A commit, tag or branch; None is the main branch.
        repo_type: Which kind of repository.

    Raises:
        InputError: The hub has no such repository or revision, or does not let us see it.
        UnavailableError: The hub cannot be reached, and there is no local copy.
    """
    if revision is not None and _COMMIT.match(revision):
        return revision
    try:
        return str(_asked(field, repo, revision, repo_type).sha)
    except UnavailableError:
        found = _local_commit(repo, revision, repo_type)
        if found is None:
            raise
        return found


def is_available(field: str, repo: str, revision: str | None, repo_type: RepoType = "model") -> bool:
    """Whether a repository can be loaded: there is a local copy of the revision, or the hub answers.

    Raises:
        InputError: The hub answers that it has no such repository or revision.
    """
    if _local_commit(repo, revision, repo_type) is not None:
        return True
    try:
        _asked(field, repo, revision, repo_type)
    except UnavailableError:
        return False
    return True


@lru_cache(maxsize=32)
def _asked(field: str, repo: str, revision: str | None, repo_type: RepoType) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where = f"{field}={repo}" + (f" (revision {revision})" if revision else "")
    try:
        return HfApi().repo_info(repo, revision=revision, repo_type=repo_type, timeout=_SECONDS)
    except OfflineModeIsEnabled as error:
        raise UnavailableError(f"{where}: HF_HUB_OFFLINE is set, and there is no local copy") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 500)
        kind = UnavailableError if status >= 500 or status == 429 else InputError
        raise kind(f"{where}: {first_line(error)}") from error
    except Exception as error:  # of whatever HTTP library the hub's client is built on
        raise UnavailableError(f"{where}: the Hugging Face hub cannot be reached ({first_line(error)})") from error


def _local_commit(repo: str, revision: str | None, repo_type: RepoType) -> str | None:
    """The commit of the local copy, whose folder is named after it; None when there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo, revision=revision, repo_type=repo_type, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return folder.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
