"""Saving the dashboard of a sweep on W&B, in the place of the one that was saved before.

The workspace is found by a name that follows from the sweep; the report, whose name W&B gives, by title and
description. So there is one of each, however often and from wherever they are saved.
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

# Not by Workspace.from_url, which refuses what the app has written anew since.
_VIEW = """
query View($entity: String!, $project: String!, $name: String!) {
  project(name: $project, entityName: $entity) {
    allViews(viewType: "project-view", viewName: $name) { edges { node { id } } }
  }
}
"""


@dataclass(frozen=True)
class Saved:
    """A workspace or a report that was saved.

    Attributes:
        kind: Which of the two.
        url: Where it is.
        replaced: Whether it was there before.
    """

    kind: str
    url: str
    replaced: bool


def publish(sweep: LoggedSweep, project: str, entity: str | None) -> Iterator[Saved]:
    """Saves the workspace, then the report, and gives each when it is there.

    Args:
        sweep: The sweep.
        project: The project of its runs.
        entity: Who has the project; None for whom the login belongs to.

    Raises:
        InputError: Nobody is logged in, W&B refuses the login, or there is no such project.
        ServerError: W&B does not answer, or refuses.
    """
    # Read when wandb is set up, and who is silent does not ask for a key either.
    os.environ["WANDB_SILENT"] = "true"
    with _in_one_line():
        import wandb

        api = wandb.Api()
        entity = entity or api.settings["entity"] or api.default_entity
        if not entity:
            raise InputError("entity: the W&B login has none of its own; name one with entity=…")
        yield _workspace(api, sweep, project, entity)
        yield _report(api, sweep, project, entity)


def _workspace(api: Any, sweep: LoggedSweep, project: str, entity: str) -> Saved:
    from wandb_workspaces._graphql import execute_graphql

    from losslens.tracking.dashboard import workspace

    made = workspace(sweep, project, entity)
    answer = execute_graphql(api, _VIEW, {"entity": entity, "project": project, "name": made._internal_name})
    if not answer.get("project"):
        raise InputError(f"project={project}: {entity} has no such project on W&B; send runs of the sweep first")
    there = [edge["node"]["id"] for edge in answer["project"]["allViews"]["edges"]]
    made._internal_id = there[0] if there else ""
    return Saved("workspace", made.save().url, bool(there))


def _report(api: Any, sweep: LoggedSweep, project: str, entity: str) -> Saved:
    from losslens.tracking.dashboard import report

    made = report(sweep, project, entity)
    for runs in (runs for block in made.blocks for runs in getattr(block, "runsets", [])):
        runs.entity, runs.project = entity, project
    there = [
        each.id
        for each in api.reports(f"{entity}/{project}")
        if (each.display_name, each.description) == (made.title, made.description)
    ]
    made.id = there[0] if there else ""
    return Saved("report", made.save().url, bool(there))


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Tells W&B's errors as ours."""
    import wandb
    from wandb.errors import AuthenticationError, UsageError
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        yield
    except UsageError as error:
        raise InputError("not logged in to W&B; `wandb login` does it, or a key in WANDB_API_KEY") from error
    except AuthenticationError as error:
        response = getattr(error.__cause__, "response", None)
        status = getattr(response, "http_status", None)
        if error.__cause__ is None or status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise InputError(f"W&B refuses the login: {first_line(error)}") from error
        raise ServerError(f"W&B does not answer: {first_line(error)}") from error
    except (wandb.Error, WandbApiFailedError) as error:
        raise ServerError(f"W&B: {first_line(error)}") from error
