"""`losslens sync`, `launch/wandb_sync.py`: uploads the W&B runs of a sweep that were logged offline."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tqdm import tqdm

from losslens.cli.key_values import KeyValueParser, tells_missing_extras
from losslens.core.commands import command_name
from losslens.core.errors import InputError, ServerError
from losslens.core.extras import format_error, require_extras
from losslens.tracking.sync import Outcome, Plan, plan, send, sync_lock


@tells_missing_extras("launch/wandb_sync.py")
def main(arguments: list[str]) -> int:
    """Uploads what is missing and returns the exit status: 0 if all is uploaded, 1 if not."""
    parser = KeyValueParser(
        {"sweep": "main", "output_dir": "outputs", "parallel": "8"},
        "sweep=main, output_dir=outputs, parallel=8",
        prog=command_name("launch/wandb_sync.py"),
        description="Uploads the W&B runs of a sweep that were logged offline, and online runs whose upload was "
        "interrupted, several at a time. Uploaded runs are marked and not sent again; failures are listed. Active runs "
        "are skipped.",
        epilog="Exit status: 0 all uploaded; 1 some uploads failed, or the server cannot be reached; 2 invalid input, "
        "or not logged in.",
    )
    settings, _ = parser.parse(arguments)
    if not settings["parallel"].isdecimal() or int(settings["parallel"]) < 1:
        parser.error(f"parallel={settings['parallel']}: number of simultaneous uploads, at least 1")
    output_dir, sweep = Path(settings["output_dir"]), settings["sweep"]
    try:
        require_extras("wandb")
        with sync_lock(output_dir, sweep):
            return _sync(output_dir, plan(output_dir, sweep), sweep, int(settings["parallel"]))
    except InputError as error:
        print(format_error(parser.prog, error), file=sys.stderr)
        return 2
    except ServerError as error:
        print(format_error(parser.prog, error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command sends what is left", file=sys.stderr)
        return 130


def _sync(output_dir: Path, found: Plan, sweep: str, parallel: int) -> int:
    for segment in found.being_written:
        print(f"{segment.name}: still at work; left for later")
    segments = [segment for run in found.runs for segment in run]
    if not segments:
        print(f"sweep {sweep}: nothing to send" + (f" ({found.sent} sent before)" if found.sent else ""))
        return 0
    outcomes: list[Outcome] = []
    started = time.monotonic()
    with tqdm(total=len(segments), desc="sending", unit="run", leave=False, dynamic_ncols=True) as bar:

        def told(outcome: Outcome) -> None:
            outcomes.append(outcome)
            bar.update()

        send(output_dir, found.runs, parallel, told)
    stays = sorted((outcome for outcome in outcomes if outcome.error), key=lambda outcome: outcome.segment.name)
    for outcome in outcomes:
        if outcome.note:
            print(f"{outcome.segment.name}: {outcome.note}")
    took = time.monotonic() - started
    print(f"sweep {sweep}: sent {len(segments) - len(stays)} of {len(segments)} in {took:.1f} s")
    for outcome in stays:
        print(f"{command_name('launch/wandb_sync.py')}: {outcome.segment.name} stays: {outcome.error}", file=sys.stderr)
    return 1 if stays else 0
