"""Resolution of Hugging Face hub ids to commits, online or from the local cache."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from losslens.core.errors import InputError, UnavailableError, first_line

RepoType = Literal["model", "dataset"]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_TIMEOUT = 10.0  # seconds


def is_hub_id(path: str) -> bool:
    """True if `path` has the form of a hub id: `name` or `owner/name`."""
    return _HUB_ID.match(path) is not None


@lru_cache(maxsize=32)
def resolve_commit(field: str, repo: str, revision: str | None, repo_type: RepoType = "model") -> str:
    """Resolves a revision of a repository to a commit.

    If the hub cannot be reached, returns the commit of the local copy.

    Args:
        field: Option that names the repository, for messages.
        repo: The hub id.
        revision: A commit (returned unchanged), tag or branch; None is the main branch.
        repo_type: Kind of repository.

    Raises:
        InputError: The hub has no such repository or revision, or denies access to it.
        UnavailableError: The hub cannot be reached, and there is no local copy.
    """
    if revision is not None and _COMMIT.match(revision):
        return revision
    try:
        return str(_repo_info(field, repo, revision, repo_type).sha)
    except UnavailableError:
        commit = _local_commit(repo, revision, repo_type)
        if commit is None:
            raise
        return commit


def is_available(field: str, repo: str, revision: str | None, repo_type: RepoType = "model") -> bool:
    """True if a repository can be loaded: a local copy of the revision exists, or the hub can be reached.

    Raises:
        InputError: The hub has no such repository or revision.
    """
    if _local_commit(repo, revision, repo_type) is not None:
        return True
    try:
        _repo_info(field, repo, revision, repo_type)
    except UnavailableError:
        return False
    return True


def adapter_from_hub(place: str) -> Path:
    """Downloads the adapter or the whole model of a repository, or of a folder in it, and returns where it lies.

    Only its configuration and its safetensors files are fetched, into the cache of the hub's client.

    Args:
        place: `owner/name`, `owner/name/folder/in/it`, either with `@revision` at its end.

    Raises:
        InputError: It has another form, or the hub has no such repository or revision, or neither of the two in it.
        UnavailableError: The hub cannot be reached, and there is no local copy.
    """
    path, _, revision = place.partition("@")
    owner_and_name, inside = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
    if "/" not in path or not is_hub_id(owner_and_name) or ".." in path.split("/"):
        raise InputError(f"{place}: no such folder, and not a hub id (owner/name or owner/name/folder)")
    commit = resolve_commit("adapter", owner_and_name, revision or None)
    files = [f"{inside}/{name}".lstrip("/") for name in ("adapter_config.json", "adapter_model.safetensors")]
    copy = _copy(place, owner_and_name, commit, files)
    if all((copy / file).is_file() for file in files):
        return copy / inside
    names = ("config.json", "model*.safetensors", "model.safetensors.index.json")
    model = _downloaded(place, owner_and_name, commit, [f"{inside}/{name}".lstrip("/") for name in names]) / inside
    if not (model / "config.json").is_file() or not any(model.glob("model*.safetensors")):
        raise InputError(f"{place}: the repository has no {' and '.join(files)} at commit {commit[:8]}, and no model")
    return model


def model_folder(field: str, repo: str, commit: str) -> Path:
    """Returns the folder of the weights of a model on the hub; downloads them unless there is a local copy.

    Raises:
        UnavailableError: The hub cannot be reached, and there is no local copy.
    """
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(repo, revision=commit, allow_patterns=wanted))
    except Exception as error:  # depends on the HTTP library of the hub's client
        raise UnavailableError(f"{field}={repo}: cannot be downloaded ({first_line(error)})") from error


def repository_from_hub(place: str) -> Path:
    """Downloads every adapter of a repository and returns the folder in which they lie.

    Of a repository only the configurations and the safetensors files of adapters are fetched.

    Args:
        place: `owner/name`, with `@revision` at its end for another than the main branch.

    Raises:
        InputError: It has another form, or the hub has no such repository or revision.
        UnavailableError: The hub cannot be reached, and there is no local copy.
    """
    repo, _, revision = place.partition("@")
    if "/" not in repo or not is_hub_id(repo):
        raise InputError(f"{place}: no such folder, and not a hub id (owner/name)")
    commit = resolve_commit("adapters", repo, revision or None)
    return _downloaded(place, repo, commit, ["*adapter_config.json", "*adapter_model*.safetensors"])


def _copy(place: str, repo: str, commit: str, files: list[str]) -> Path:
    """Returns the folder of the local copy, after downloading `files` if it lacks one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        copy = Path(snapshot_download(repo, revision=commit, local_files_only=True))
        if all((copy / file).is_file() for file in files):
            return copy
    except LocalEntryNotFoundError:
        pass
    return _downloaded(place, repo, commit, files)


def _downloaded(place: str, repo: str, commit: str, patterns: list[str]) -> Path:
    """Downloads what matches the patterns; without a connection, returns the local copy if there is one."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=commit, allow_patterns=patterns))
    except Exception as error:  # depends on the HTTP library of the hub's client
        raise UnavailableError(f"{place}: cannot be downloaded ({first_line(error)})") from error


@lru_cache(maxsize=32)
def _repo_info(field: str, repo: str, revision: str | None, repo_type: RepoType) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where = f"{field}={repo}" + (f" (revision {revision})" if revision else "")
    try:
        return HfApi().repo_info(repo, revision=revision, repo_type=repo_type, timeout=_TIMEOUT)
    except OfflineModeIsEnabled as error:
        raise UnavailableError(f"{where}: HF_HUB_OFFLINE is set, and there is no local copy") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 500)
        kind = UnavailableError if status >= 500 or status == 429 else InputError
        raise kind(f"{where}: {first_line(error)}") from error
    except Exception as error:  # depends on the HTTP library of the hub's client
        raise UnavailableError(f"{where}: the Hugging Face hub cannot be reached ({first_line(error)})") from error


def _local_commit(repo: str, revision: str | None, repo_type: RepoType) -> str | None:
    """Returns the commit of the local copy, from its folder's name; None if there is no copy."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo, revision=revision, repo_type=repo_type, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return folder.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
