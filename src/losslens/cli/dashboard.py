"""`losslens dashboard`, `launch/wandb_dashboard.py`: creates a workspace and a report of a sweep on W&B."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from losslens.cli.key_values import KeyValueParser, tells_missing_extras
from losslens.config.tracking import PROJECT
from losslens.core.commands import command_name
from losslens.core.errors import InputError, ServerError
from losslens.core.extras import format_error, require_extras
from losslens.tracking.logged_sweep import logged_sweep
from losslens.tracking.panels import missing_data
from losslens.tracking.publish import publish


@tells_missing_extras("launch/wandb_dashboard.py")
def main(arguments: list[str]) -> int:
    """Creates both and returns the exit status: 0 if saved, 1 if W&B fails, 2 for invalid input."""
    parser = KeyValueParser(
        {"sweep": "main", "project": "losslens", "entity": "", "output_dir": "outputs"},
        "sweep=main, project=losslens, entity=NAME (default: that of the login), output_dir=outputs",
        prog=command_name("launch/wandb_dashboard.py"),
        description="Creates a workspace and a report of a sweep's runs on W&B: training, geometry, accuracy, and the "
        "comparison of losses. Running it again replaces both. The content is determined from the sweep's folder.",
        epilog="Exit status: 0 done; 1 W&B fails or cannot be reached; 2 invalid input, or not logged in to W&B.",
    )
    parser.add_argument("--dry-run", action="store_true", help="print both as JSON without contacting W&B")
    settings, asked = parser.parse(arguments)
    output_dir, name, project, entity = (settings[key] for key in ("output_dir", "sweep", "project", "entity"))
    if not re.match(PROJECT, project):
        parser.error(f"project={project}: W&B accepts up to 128 characters without / \\ # ? % :")
    try:
        require_extras("wandb")
        sweep = logged_sweep(Path(output_dir), name)
        if asked.dry_run:
            from losslens.tracking.dashboard import definition

            print(json.dumps(definition(sweep, project, entity), indent=2, ensure_ascii=False))
        else:
            for saved in publish(sweep, project, entity or None):
                print(f"{saved.kind} {'replaced' if saved.replaced else 'made'}: {saved.url}", flush=True)
    except (InputError, ServerError) as error:
        print(format_error(parser.prog, error), file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    for gap in missing_data(sweep):
        print(f"{parser.prog}: {gap}", file=sys.stderr)
    return 0
