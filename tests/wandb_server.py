"""A stub of the W&B server, in a process of its own on loopback, that keeps all it got: `python wandb_server.py`.

It covers what the client (wandb 0.31 with wandb-core, and wandb-workspaces 0.4) sends to log in, to log, to resume and
to sync runs, to log, use and fetch artifacts, and to save workspaces and reports:

- who is logged in: any key of 40 characters or more, and nobody without one (401);
- runs: `upsertBucket`; the status to resume from, with the lines that there are; `file_stream`, where lines sent again
  at the same offset replace those that lie there, and rows of history of the same `_step` one another (as wandb says
  its server does, in its pull requests 11144 and 12189; `repeated` counts them); URLs for files, and their PUTs; the
  state follows from what is sent: running until the stream is complete, then finished or failed by its exit code;
- artifacts: created, or given back as COMMITTED where the collection has the digest already; manifest, files, commit
  (refused unless every file of the manifest came with its own MD5), versions, aliases, which run made it (the first
  that logged it), which logged and which used it; by name and alias, with manifest and files to download;
- projects, and views (workspaces and reports): made, replaced by id, listed, read, deleted.

It does not cover sweeps, launch, registries, teams, parts of large files, forking and rewinding runs, queries over runs
(filters, sampled history), quotas, permissions, and merging of summaries; all entities are allowed, and an empty one is
the user's. What is asked and
not covered is answered with null and listed under `missing`. A run that comes again under its id without being resumed
keeps what is not overwritten; whether the real server cuts off the rest is not known here.

What it got: GET /_seen (runs, artifacts, views, missing), GET /_requests (every body as text, and how it was answered),
PUT /_faults to misbehave, PUT /_reset to forget. `WandbServer` starts, asks and stops it.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "loss1ens" * 5  # made up, of the form of a key
ENTITY = "tester"


class RefusedError(Exception):
    """An answer that says what is wrong."""


@dataclass
class Run:
    """A run as a server knows it; `lines` by stream and offset."""

    entity: str
    project: str
    name: str
    display_name: str = ""
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    host: str | None = None
    program: str | None = None
    repo: str | None = None
    commit: str | None = None
    config: str = "{}"
    summary: str = "{}"
    state: str = "running"
    exit_code: int | None = None
    upserts: int = 0
    resumed: int = 0
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    overwritten: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    uploaded: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        return _global_id("Run", self.name, self.project, self.entity)

    @property
    def history(self) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.stream("wandb-history.jsonl")]
        by_step = {row.get("_step", f"line {number}"): row for number, row in enumerate(rows)}
        return sorted(by_step.values(), key=lambda row: row.get("_step", -1))

    @property
    def repeated(self) -> int:
        return self.overwritten + len(self.stream("wandb-history.jsonl")) - len(self.history)

    def stream(self, name: str) -> list[str]:
        lines = self.lines.get(name, {})
        return [lines[offset] for offset in sorted(lines)]


@dataclass
class Artifact:
    """A version of an artifact."""

    id: str
    entity: str
    project: str
    name: str
    type: str
    digest: str
    algorithm: str
    client_id: str | None
    description: str | None = None
    metadata: str | None = None
    tags: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    state: str = "PENDING"
    version: int | None = None
    manifest: bytes | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    logged_by: list[str] = field(default_factory=list)
    used_by: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.name}:v{self.version}" if self.version is not None else f"{self.name}:{self.id}"


def _global_id(*parts: str) -> str:
    return base64.b64encode(":".join(parts).encode()).decode()


class Store:
    """All that came, and the GraphQL root that answers from it."""

    def __init__(self, address: str):
        self.address = address
        self.lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        self.projects: dict[tuple[str, str], str] = {}
        self.runs: dict[tuple[str, str, str], Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.manifests: dict[str, str] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.missing: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.faults: list[dict[str, Any]] = []
        self.root = {
            **{
                name: getattr(self, f"query_{name}")
                for name in ("viewer", "entity", "model", "models", "artifact", "view")
            },
            "project": self.query_model,
            "serverInfo": self.query_server_info,
            "clientIDMapping": self.query_client_id,
            "upsertBucket": self.upsert_run,
            "upsertModel": self.upsert_project,
            "createRunFiles": self.create_run_files,
            "markRunFilesUploaded": self.mark_run_files,
            "createArtifact": self.create_artifact,
            "createArtifactManifest": self.create_manifest,
            "updateArtifactManifest": self.update_manifest,
            "createArtifactFiles": self.create_artifact_files,
            "commitArtifact": self.commit_artifact,
            "updateArtifact": self.update_artifact,
            "useArtifact": self.use_artifact,
            "upsertView": self.upsert_view,
            "deleteView": self.delete_view,
        }

    # Who, and where.

    def query_viewer(self) -> dict[str, Any]:
        return {
            "id": _global_id("User", ENTITY), "name": ENTITY, "username": ENTITY, "entity": ENTITY, "email": None,
            "admin": False, "flags": "{}", "deletedAt": None, "teams": _connection([]), "apiKeys": _connection([]),
        }  # fmt: skip

    def query_server_info(self) -> dict[str, Any]:
        return {"features": [], "cliVersionInfo": {"max_cli_version": "1.0.0"}, "latestLocalVersionInfo": None}

    def query_entity(self, name: str | None = None) -> dict[str, Any]:
        name = name or ENTITY
        return {
            "id": _global_id("Entity", name), "name": name, "xxhashDigestsEnabled": False, "organization": None,
            "user": None, "isTeam": False,
        }  # fmt: skip

    def query_model(self, name: str | None = None, entityName: str | None = None) -> dict[str, Any] | None:  # noqa: N803
        entity, project = entityName or ENTITY, name or "uncategorized"
        if (entity, project) not in self.projects:
            return None

        def run(name: str, **_: Any) -> dict[str, Any] | None:
            found = self.runs.get((entity, project, name))
            return found and self.run_fields(found)

        def bucket(name: str, **_: Any) -> dict[str, Any] | None:
            found = self.runs.get((entity, project, name))
            if found:
                found.resumed += 1
            return found and self.run_fields(found)

        def membership(name: str) -> dict[str, Any] | None:
            found = self.find_artifact(entity, project, name)
            return found and self.membership_fields(found)

        def views(viewType: str = "runs", viewName: str | None = None, **_: Any) -> dict[str, Any]:  # noqa: N803
            found = [view for view in self.views.values() if (view["entity"], view["projectName"]) == (entity, project)]
            found = [view for view in found if view["type"] == viewType and viewName in (None, view["name"])]
            return _connection([self.view_fields(view) for view in found])

        def artifact_type(name: str) -> dict[str, Any] | None:
            return {
                "id": _global_id("ArtifactType", name), "name": name, "description": None, "createdAt": _now(),
                "artifactCollection": lambda name: self.collection_fields(entity, project, name),
            }  # fmt: skip

        def collection(name: str) -> dict[str, Any] | None:
            return self.collection_fields(entity, project, name)

        def artifact(name: str) -> dict[str, Any] | None:
            found = self.find_artifact(entity, project, name)
            return found and self.artifact_fields(found)

        return {
            **self.project_fields(entity, project), "run": run, "bucket": bucket, "allViews": views,
            "artifactCollectionMembership": membership, "artifactCollection": collection, "artifactType": artifact_type,
            "artifact": artifact,
        }  # fmt: skip

    def query_models(self, entityName: str | None = None, **_: Any) -> dict[str, Any]:  # noqa: N803
        return _connection([self.project_fields(*key) for key in self.projects if key[0] == (entityName or ENTITY)])

    def upsert_project(self, input: dict[str, Any]) -> dict[str, Any]:
        entity, name = input.get("entityName") or ENTITY, input["name"]
        inserted = (entity, name) not in self.projects
        self.projects.setdefault((entity, name), _now())
        fields = self.project_fields(entity, name)
        return {"project": fields, "model": fields, "inserted": inserted}

    def project_fields(self, entity: str, project: str) -> dict[str, Any]:
        return {
            "id": _global_id("Project", project, entity), "internalId": _global_id("ProjectInternalId", "1"),
            "name": project, "entityName": entity, "entity": self.query_entity(entity), "description": None,
            "access": "PRIVATE", "views": "{}", "readOnly": False, "isBenchmark": False, "user": None,
            "createdAt": self.projects.get((entity, project), ""),
        }  # fmt: skip

    # Runs.

    def upsert_run(self, input: dict[str, Any]) -> dict[str, Any]:
        known = [run for run in self.runs.values() if input.get("id") and run.id == input["id"]]
        if known:
            run, inserted = known[0], False
        else:
            entity, project = input.get("entityName") or ENTITY, input.get("modelName") or "uncategorized"
            self.projects.setdefault((entity, project), _now())
            key = (entity, project, input["name"])
            inserted = key not in self.runs
            run = self.runs.setdefault(key, Run(*key, display_name=input["name"]))
        run.upserts += 1
        names = {
            "displayName": "display_name", "groupName": "group", "jobType": "job_type", "tags": "tags",
            "notes": "notes", "host": "host", "jobProgram": "program", "jobRepo": "repo", "commit": "commit",
            "config": "config", "summaryMetrics": "summary", "state": "state",
        }  # fmt: skip
        for given, name in names.items():
            if input.get(given) is not None:
                setattr(run, name, input[given])
        return {"bucket": self.run_fields(run), "inserted": inserted}

    def run_fields(self, run: Run) -> dict[str, Any]:
        history, events = run.stream("wandb-history.jsonl"), run.stream("wandb-events.jsonl")
        of = lambda ids: _connection([self.artifact_fields(self.artifacts[id]) for id in ids])  # noqa: E731
        return {
            "id": run.id, "name": run.name, "displayName": run.display_name, "description": run.notes,
            "notes": run.notes, "config": run.config, "summaryMetrics": run.summary, "tags": run.tags,
            "group": run.group, "groupName": run.group, "jobType": run.job_type, "state": run.state, "sweepName": None,
            "historyLineCount": len(history), "eventsLineCount": len(events),
            "logLineCount": len(run.stream("output.log")), "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]), "wandbConfig": lambda **_: json.dumps({"t": 1}),
            "project": self.project_fields(run.entity, run.project), "stopped": False, "projectId": 1,
            "commit": run.commit, "createdAt": _now(), "heartbeatAt": _now(), "readOnly": False, "systemMetrics": "{}",
            "user": self.query_viewer(), "historyKeys": None,
            "inputArtifacts": lambda **_: of(run.used), "outputArtifacts": lambda **_: of(run.logged),
        }  # fmt: skip

    def run_of(self, input: dict[str, Any]) -> Run:
        key = (input["entityName"] or ENTITY, input["projectName"], input.get("runName") or "")
        if key not in self.runs:
            raise RefusedError(f"run {'/'.join(key)} not found")
        return self.runs[key]

    def create_run_files(self, input: dict[str, Any]) -> dict[str, Any]:
        run = self.run_of(input)
        path = "/".join(map(urllib.parse.quote, (run.entity, run.project, run.name)))
        urls = {name: f"{self.address}/_run_file/{path}/{urllib.parse.quote(name)}" for name in input["files"]}
        files = [{"name": name, "uploadUrl": url} for name, url in urls.items()]
        return {"runID": run.id, "uploadHeaders": [], "files": files}

    def mark_run_files(self, input: dict[str, Any]) -> dict[str, Any]:
        self.run_of(input).uploaded += input["files"]
        return {"success": True}

    def file_stream(self, key: tuple[str, str, str], sent: dict[str, Any]) -> dict[str, Any]:
        if key not in self.runs:
            raise RefusedError("run not found")
        run = self.runs[key]
        for name, part in (sent.get("files") or {}).items():
            lines = run.lines.setdefault(name, {})
            for offset, line in enumerate(part["content"], part.get("offset", 0)):
                run.overwritten += offset in lines and name == "wandb-history.jsonl"
                lines[offset] = line
            if name == "wandb-summary.json" and part["content"]:
                run.summary = part["content"][-1]
        run.uploaded += sent.get("uploaded") or []
        run.state = "running"
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")
            run.state = "failed" if run.exit_code else "finished"
        return {"exitcode": None, "limits": {}}

    # Artifacts.

    def query_artifact(self, id: str) -> dict[str, Any] | None:
        return self.artifact_fields(self.artifacts[id]) if id in self.artifacts else None

    def query_client_id(self, clientID: str) -> dict[str, Any] | None:  # noqa: N803
        found = [artifact for artifact in self.artifacts.values() if artifact.client_id == clientID]
        return {"serverID": found[0].id} if found else None

    def create_artifact(self, input: dict[str, Any]) -> dict[str, Any]:
        entity, project = input["entityName"] or ENTITY, input["projectName"]
        name = input.get("artifactCollectionName") or (input.get("artifactCollectionNames") or [None])[0]
        run = self.run_of(input) if input.get("runName") else None  # what is only used names no run here
        same = self.versions(entity, project, name)
        if any(each.type != input["artifactTypeName"] for each in same):
            raise RefusedError(f"artifact {name} has another type")
        found = next((each for each in same if each.digest == input["digest"] and each.state == "COMMITTED"), None)
        if found is None:
            found = Artifact(
                _global_id("Artifact", str(len(self.artifacts) + 1)), entity, project, name, input["artifactTypeName"],
                input["digest"], input.get("digestAlgorithm", ""), input.get("clientID"), input.get("description"),
                input.get("metadata"), [each["tagName"] for each in input.get("tags") or []],
            )  # fmt: skip
            self.artifacts[found.id] = found
        elif input.get("clientID"):
            found.client_id = input["clientID"]
        for alias in input.get("aliases") or []:
            for each in same:
                each.aliases = [name for name in each.aliases if name != alias["alias"]]
            found.aliases = sorted({*found.aliases, alias["alias"]})
        if run and found.id not in run.logged:
            run.logged.append(found.id)
            found.logged_by.append(run.name)
        return {"artifact": self.artifact_fields(found)}

    def create_manifest(self, input: dict[str, Any]) -> dict[str, Any]:
        id = _global_id("ArtifactManifest", str(len(self.manifests) + 1))
        self.manifests[id] = input["artifactID"]
        return self.manifest_answer(id)

    def update_manifest(self, input: dict[str, Any]) -> dict[str, Any]:
        return self.manifest_answer(input["artifactManifestID"])

    def manifest_answer(self, id: str) -> dict[str, Any]:
        url = f"{self.address}/_manifest/{urllib.parse.quote(self.manifests[id])}"
        return {"artifactManifest": {"id": id, "file": {"id": id, "uploadUrl": url, "uploadHeaders": []}}}

    def create_artifact_files(self, input: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for sent in input["artifactFiles"]:
            artifact = self.artifacts[sent["artifactID"]]
            for each in self.versions(artifact.entity, artifact.project, artifact.name):
                if sent["name"] not in artifact.files and _md5(each.files.get(sent["name"])) == sent["md5"]:
                    artifact.files[sent["name"]] = each.files[sent["name"]]
            known = _md5(artifact.files.get(sent["name"])) == sent["md5"]
            nodes.append(
                {
                    "name": sent["name"], "storagePath": f"{artifact.id}/{sent['name']}", "uploadHeaders": [],
                    "uploadUrl": None if known else self.artifact_url(artifact, sent["name"]),
                    "uploadMultipartUrls": None, "artifact": {"id": artifact.id},
                }
            )  # fmt: skip
        return {"files": _connection(nodes)}

    def artifact_url(self, artifact: Artifact, name: str) -> str:
        return f"{self.address}/_artifact_file/{urllib.parse.quote(artifact.id)}/{urllib.parse.quote(name)}"

    def commit_artifact(self, input: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[input["artifactID"]]
        if artifact.manifest is None:
            raise RefusedError("no manifest")
        for name, entry in json.loads(artifact.manifest)["contents"].items():
            if "ref" not in entry and _md5(artifact.files.get(name)) != entry["digest"]:
                raise RefusedError(f"{name} did not arrive as the manifest has it")
        if artifact.state != "COMMITTED":
            committed = [each.version for each in self.versions(artifact.entity, artifact.project, artifact.name)]
            artifact.version = sum(version is not None for version in committed)
            artifact.state = "COMMITTED"
        return {"artifact": self.artifact_fields(artifact)}

    def update_artifact(self, input: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[input["artifactID"]]
        artifact.metadata = input.get("metadata") or artifact.metadata
        artifact.description = input.get("description") or artifact.description
        if input.get("aliases") is not None:
            artifact.aliases = sorted(each["alias"] for each in input["aliases"])
        return {"artifact": self.artifact_fields(artifact)}

    def use_artifact(self, input: dict[str, Any]) -> dict[str, Any]:
        artifact, run = self.artifacts[input["artifactID"]], self.run_of(input)
        if artifact.id not in run.used:
            run.used.append(artifact.id)
            artifact.used_by.append(run.name)
        return {"artifact": self.artifact_fields(artifact)}

    def versions(self, entity: str, project: str, name: str) -> list[Artifact]:
        where = (entity, project, name)
        return [each for each in self.artifacts.values() if (each.entity, each.project, each.name) == where]

    def find_artifact(self, entity: str, project: str, name: str) -> Artifact | None:
        collection, _, alias = name.partition(":")
        for each in self.versions(entity, project, collection):
            if each.state == "COMMITTED" and (alias or "latest") in (*each.aliases, f"v{each.version}", each.digest):
                return each
        return None

    def collection_fields(self, entity: str, project: str, name: str) -> dict[str, Any] | None:
        versions = self.versions(entity, project, name)
        if not versions:
            return None
        kind = {"id": _global_id("ArtifactType", versions[0].type), "name": versions[0].type}

        def membership(aliasName: str) -> dict[str, Any] | None:  # noqa: N803
            found = self.find_artifact(entity, project, f"{name}:{aliasName}")
            return found and self.membership_fields(found)

        return {
            "__typename": "ArtifactSequence", "id": _global_id("ArtifactSequence", name), "name": name,
            "project": self.project_fields(entity, project), "digestAlgorithm": "MANIFEST_MD5",
            "defaultArtifactType": kind, "artifactType": kind, "artifactMembership": membership,
        }  # fmt: skip

    def artifact_fields(self, artifact: Artifact) -> dict[str, Any]:
        collection = self.collection_fields(artifact.entity, artifact.project, artifact.name) or {}
        committed = [
            each
            for each in self.versions(artifact.entity, artifact.project, artifact.name)
            if each.state == "COMMITTED"
        ]
        latest = max(committed, key=lambda each: each.version or 0, default=None)
        url = f"{self.address}/_manifest/{urllib.parse.quote(artifact.id)}"
        aliases = [
            {"__typename": "ArtifactAlias", "id": _global_id("Alias", artifact.id, name), "alias": name,
             "artifactCollection": collection}
            for name in artifact.aliases
        ]  # fmt: skip

        def files(**_: Any) -> dict[str, Any]:
            nodes = [
                {"id": _global_id("File", name), "name": name, "url": self.artifact_url(artifact, name),
                 "directUrl": self.artifact_url(artifact, name), "sizeBytes": len(body), "mimetype": None,
                 "storagePath": f"{artifact.id}/{name}", "md5": _md5(body), "digest": _md5(body), "updatedAt": _now()}
                for name, body in artifact.files.items()
            ]  # fmt: skip
            return _connection(nodes)

        return {
            "__typename": "Artifact", "id": artifact.id, "state": artifact.state, "digest": artifact.digest,
            "digestAlgorithm": artifact.algorithm or "MANIFEST_MD5", "description": artifact.description,
            "metadata": artifact.metadata, "versionIndex": artifact.version, "aliases": aliases,
            "artifactSequence": {**collection, "latestArtifact": latest and {"id": latest.id}},
            "artifactType": {"id": _global_id("ArtifactType", artifact.type), "name": artifact.type},
            "ttlDurationSeconds": -1, "ttlIsInherited": True, "tags": [], "historyStep": None,
            "commitHash": artifact.id, "size": sum(map(len, artifact.files.values())), "fileCount": len(artifact.files),
            "createdAt": _now(), "updatedAt": None, "files": files,
            "currentManifest": {"id": artifact.id, "file": {"directUrl": url}},
            "filesByManifestEntries": files,
        }  # fmt: skip

    def membership_fields(self, artifact: Artifact) -> dict[str, Any]:
        fields = self.artifact_fields(artifact)
        return {
            "__typename": "ArtifactCollectionMembership", "id": _global_id("Membership", artifact.id),
            "versionIndex": artifact.version, "createdAt": _now(), "aliases": fields["aliases"], "artifact": fields,
            "artifactCollection": fields["artifactSequence"], "files": fields["files"],
            "filesByManifestEntries": fields["files"],
        }  # fmt: skip

    # Workspaces and reports.

    def upsert_view(self, input: dict[str, Any]) -> dict[str, Any]:
        id = input.get("id") or _global_id("View", str(len(self.views) + 1))
        inserted = id not in self.views
        if inserted and input.get("id"):
            raise RefusedError("no view of this id")
        entity, project = input.get("entityName") or ENTITY, input.get("projectName")
        if inserted and (entity, project) not in self.projects:
            raise RefusedError(f"project {entity}/{project} not found")
        json.loads(input["spec"])
        view = self.views.setdefault(
            id, {"id": id, "entity": entity, "projectName": project, "type": input.get("type")}
        )
        view.update({name: value for name, value in input.items() if value is not None and name != "id"})
        return {"view": self.view_fields(view), "inserted": inserted}

    def view_fields(self, view: dict[str, Any]) -> dict[str, Any]:
        return {
            "description": "", **view, "project": self.project_fields(view["entity"], view["projectName"]),
            "createdAt": _now(), "updatedAt": _now(), "accessTokens": [], "user": None,
        }  # fmt: skip

    def query_view(self, id: str) -> dict[str, Any] | None:
        return self.view_fields(self.views[id]) if id in self.views else None

    def delete_view(self, input: dict[str, Any]) -> dict[str, Any]:
        return {"success": self.views.pop(input["id"], None) is not None, "pendingDrafts": []}

    # What a test may ask.

    def seen(self) -> dict[str, Any]:
        named = {id: artifact.title for id, artifact in self.artifacts.items()}
        return {
            "runs": {
                run.name: {
                    "entity": run.entity, "project": run.project, "name": run.display_name, "group": run.group,
                    "job_type": run.job_type, "tags": run.tags, "notes": run.notes, "host": run.host,
                    "program": run.program, "repo": run.repo, "commit": run.commit, "config": json.loads(run.config),
                    "history": run.history, "repeated": run.repeated, "events": len(run.stream("wandb-events.jsonl")),
                    "output": run.stream("output.log"), "summary": json.loads(run.summary), "state": run.state,
                    "exit_code": run.exit_code, "upserts": run.upserts, "resumed": run.resumed,
                    "files": {name: len(body) for name, body in run.files.items()},
                    "uploaded": run.uploaded,
                    "logged": [named[id] for id in run.logged], "used": [named[id] for id in run.used],
                }
                for run in self.runs.values()
            },
            "artifacts": [
                {
                    "name": each.name, "version": each.version, "type": each.type, "digest": each.digest,
                    "state": each.state, "aliases": each.aliases, "description": each.description,
                    "metadata": json.loads(each.metadata or "{}"),
                    "made_by": each.logged_by[0] if each.logged_by else None, "logged_by": each.logged_by,
                    "used_by": each.used_by, "entity": each.entity, "project": each.project,
                    "files": {name: len(body) for name, body in each.files.items()},
                    "manifest": json.loads(each.manifest) if each.manifest else None,
                }
                for each in self.artifacts.values()
            ],
            "views": [{**view, "spec": json.loads(view["spec"])} for view in self.views.values()],
            "projects": ["/".join(key) for key in self.projects],
            "missing": sorted(set(self.missing)),
        }  # fmt: skip


def _connection(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    page = {"hasNextPage": False, "endCursor": None}
    return {"edges": [{"node": node, "cursor": ""} for node in nodes], "pageInfo": page, "totalCount": len(nodes)}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _md5(body: bytes | None) -> str | None:
    return None if body is None else base64.b64encode(hashlib.md5(body).digest()).decode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.serve()

    def do_POST(self) -> None:
        self.serve()

    def do_PUT(self) -> None:
        self.serve()

    def serve(self) -> None:
        body = self.body()
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path in ("/_seen", "/_requests", "/_faults", "/_reset"):
            self.reply(200, json.dumps(self.control(path, body)).encode())
            return
        text = body.decode("utf-8", "replace")
        headers = {name: value for name, value in self.headers.items() if name != "Authorization"}
        entry = {"method": self.command, "path": path, "body": text, "headers": headers, "at": time.monotonic()}
        with self.store.lock:
            self.store.requests.append(entry)
            fault = self.fault(f"{self.command} {path}\n{text}")
        time.sleep(fault.get("delay", 0))
        status = fault.get("status")
        entry["status"] = status
        if status == "silent":
            while fault in self.store.faults:
                time.sleep(0.05)
            self.close_connection = True
        elif status == "closes":
            self.close_connection = True
        elif status is not None:
            self.reply(status, json.dumps({"errors": [{"message": fault.get("message", "told to fail")}]}).encode())
        else:
            self.reply(*self.good(path, body, entry))

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(chunks)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def control(self, path: str, body: bytes) -> Any:
        store = self.store
        with store.lock:
            if path == "/_seen":
                return store.seen()
            if path == "/_requests":
                return store.requests
            if path == "/_reset":
                store.clear()
            else:
                store.faults = json.loads(body)
        return {}

    def fault(self, request: str) -> dict[str, Any]:
        for fault in self.store.faults:
            if fault.get("times") != 0 and re.search(fault.get("match", ""), request):
                if "times" in fault:
                    fault["times"] -= 1
                return fault
        return {}

    def good(self, path: str, body: bytes, entry: dict[str, Any]) -> tuple[int, bytes]:
        kind, _, rest = path.lstrip("/").partition("/")
        entry["status"] = 200
        # What is stored is fetched without a key, as from a bucket.
        with self.store.lock:
            if kind in ("_run_file", "_artifact_file", "_manifest"):
                return self.stored(kind, rest, body)
            key = base64.b64decode((self.headers.get("Authorization") or "Basic ").partition(" ")[2]).decode()
            if len(key.partition(":")[2]) < 40:
                entry["status"] = 401
                return 401, b'{"errors": [{"message": "user is not logged in"}]}'
            try:
                if path == "/graphql":
                    return 200, json.dumps(self.graphql(json.loads(body), entry)).encode()
                if kind == "files" and path.endswith("/file_stream"):
                    entity, project, run, _ = rest.split("/")
                    return 200, json.dumps(self.store.file_stream((entity, project, run), json.loads(body))).encode()
            except RefusedError as error:
                entry["status"] = 400
                return 400, json.dumps({"error": str(error)}).encode()
        self.store.missing.append(f"{self.command} {path}")
        entry["status"] = 404
        return 404, b'{"error": "not covered"}'

    def graphql(self, request: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"data": answer(request["query"], request.get("variables") or {}, self.store.root, self.missed)}
        except RefusedError as error:
            entry["status"] = str(error)
            return {"data": None, "errors": [{"message": str(error)}]}
        except Exception as error:
            entry["status"] = repr(error)
            self.missed(f"{request['query']} {request.get('variables')}: {error!r}")
            return {"data": None, "errors": [{"message": f"not covered: {error!r}"}]}

    def missed(self, what: str) -> None:
        self.store.missing.append(what)

    def stored(self, kind: str, rest: str, body: bytes) -> tuple[int, bytes]:
        store, put = self.store, self.command == "PUT"
        if kind == "_manifest":
            artifact = store.artifacts[rest]
            if put:
                artifact.manifest = body
            return 200, b"" if put else artifact.manifest or b""
        if kind == "_artifact_file":
            id, _, name = rest.partition("/")
            files = store.artifacts[id].files
        else:
            entity, project, run, name = rest.split("/", 3)
            files = store.runs[entity, project, run].files
        if put:
            files[name] = body
        return 200, b"" if put else files[name]

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients are killed in tests
            super().handle_error(*_)


class WandbServer:
    """The server's process, and what a client must have in its environment to speak to it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{self.process.stdout.readline().strip()}"
        self.environment = {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ERROR_REPORTING": "false",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def _ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method="GET" if body is None else "PUT")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return json.load(response)

    def seen(self) -> dict[str, Any]:
        """`runs` by id, `artifacts`, `views`, `projects`, and what was asked that this server does not cover."""
        return self._ask("/_seen")

    def requests(self) -> list[dict[str, Any]]:
        """Every request since the last reset: method, path, body as text, headers but the key, status, time."""
        return self._ask("/_requests")

    def fail(self, *faults: dict[str, Any]) -> None:
        """From now on the first of `faults` whose `match` (a pattern) is found in "METHOD path\\nbody" applies.

        `status` is an HTTP status, "silent" (accepts and never answers) or "closes"; `delay` is in seconds; `times` is
        how often it applies. None mends everything.
        """
        self._ask("/_faults", list(faults))

    def reset(self) -> None:
        """Forgets all it got, and its faults."""
        self._ask("/_reset", {})

    def stop(self) -> None:
        """Kills it: from now on nobody listens on its port."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serving() -> Iterator[WandbServer]:
    """A server for as long as the block lasts."""
    server = WandbServer()
    try:
        yield server
    finally:
        server.stop()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from small_graphql import answer

    server = Quiet(("127.0.0.1", 0), Handler)
    Handler.store = Store(f"http://127.0.0.1:{server.server_address[1]}")
    # Nobody is left to stop it once whoever started it is gone.
    parent = os.getppid()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    while os.getppid() == parent:
        time.sleep(0.2)
