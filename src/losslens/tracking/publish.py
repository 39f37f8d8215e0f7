"""Saving of a sweep's dashboard on W&B, replacing the one that was saved before.

The workspace is found by its internal name, which is derived from the sweep; the report, whose name W&B assigns, by
title and description. So there is only one of each, however often and from whichever machine they are saved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from losslens.core.errors import InputError, ServerError, first_line
from losslens.tracking.logged_sweep import LoggedSweep

# Instead of Workspace.from_url, which rejects workspaces that were edited in the app.
_VIEW = """
query View($entity: String!, $project: String!, $name: String!) {
  project(name: $project, entityName: $entity) {
    allViews(viewType: "project-view", viewName: $name) { edges { node { id } } }
  }
}
"""


@dataclass(frozen=True)
class Saved:
    """A saved workspace or report.

    Attributes:
        kind: `workspace` or `report`.
        url: Its URL.
        replaced: True if it replaced an existing one.
    """

    kind: str
    url: str
    replaced: bool


def publish(sweep: LoggedSweep, project: str, entity: str | None) -> Iterator[Saved]:
    """Saves the workspace, then the report, and yields each once it is saved.

    Args:
        sweep: The sweep.
        project: Project of its runs.
        entity: Entity of the project; by default that of the login.

    Raises:
        InputError: Not logged in to W&B, the login is rejected, or the project does not exist.
        ServerError: W&B does not respond, or rejects the request.
    """
    # Must be set before wandb is set up; in silent mode it does not prompt for an API key.
    os.environ["WANDB_SILENT"] = "true"
    with _translated_errors():
        import wandb

        api = wandb.Api()
        entity = entity or api.settings["entity"] or api.default_entity
        if not entity:
            raise InputError("entity: the W&B login has no default entity; set it with entity=…")
        yield _workspace(api, sweep, project, entity)
        yield _report(api, sweep, project, entity)


def _workspace(api: Any, sweep: LoggedSweep, project: str, entity: str) -> Saved:
    from wandb_workspaces._graphql import execute_graphql

    from losslens.tracking.dashboard import workspace

    new = workspace(sweep, project, entity)
    response = execute_graphql(api, _VIEW, {"entity": entity, "project": project, "name": new._internal_name})
    if not response.get("project"):
        raise InputError(f"project={project}: {entity} has no such project on W&B; send runs of the sweep first")
    existing = [edge["node"]["id"] for edge in response["project"]["allViews"]["edges"]]
    new._internal_id = existing[0] if existing else ""
    return Saved("workspace", new.save().url, bool(existing))


def _report(api: Any, sweep: LoggedSweep, project: str, entity: str) -> Saved:
    from losslens.tracking.dashboard import report

    new = report(sweep, project, entity)
    for runs in (runs for block in new.blocks for runs in getattr(block, "runsets", [])):
        runs.entity, runs.project = entity, project
    existing = [
        each.id
        for each in api.reports(f"{entity}/{project}")
        if (each.display_name, each.description) == (new.title, new.description)
    ]
    new.id = existing[0] if existing else ""
    return Saved("report", new.save().url, bool(existing))


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Converts W&B's exceptions to LossLens's, with one-line messages."""
    import wandb
    from wandb.errors import AuthenticationError, UsageError
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        yield
    except UsageError as error:
        raise InputError("not logged in to W&B; run `wandb login` or set WANDB_API_KEY") from error
    except AuthenticationError as error:
        response = getattr(error.__cause__, "response", None)
        status = getattr(response, "http_status", None)
        if error.__cause__ is None or status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise InputError(f"W&B rejects the login: {first_line(error)}") from error
        raise ServerError(f"W&B does not respond: {first_line(error)}") from error
    except (wandb.Error, WandbApiFailedError) as error:
        raise ServerError(f"W&B: {first_line(error)}") from error
