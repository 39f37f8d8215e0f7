"""One line a run: `python launch/status.py sweep=NAME [output_dir=outputs]`; exits 0 only if all are completed."""

import sys
from pathlib import Path

from losslens.errors import InputError
from losslens.runs import Run, runs_of


def main(arguments: list[str]) -> int:
    """Prints the states and gives the exit status."""
    options = {"sweep": "main", "output_dir": "outputs"}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in options or not equals:
            print(f"status.py: {argument}: takes sweep=NAME and output_dir=FOLDER", file=sys.stderr)
            return 2
        options[name] = value
    try:
        runs = runs_of(Path(options["output_dir"]), options["sweep"])
    except InputError as error:
        print(f"status.py: {error}", file=sys.stderr)
        return 2
    completed = [_show(run) for run in runs]
    return 0 if completed and all(completed) else 1


def _show(run: Run) -> bool:
    """Prints a run's line; whether it is completed."""
    try:
        status = run.status
    except InputError as error:
        status = {"state": "damaged", "error": str(error)}
    step = f"step {status['step']}/{status['max_steps']}" if "step" in status else ""
    loss = f"loss {status['loss']:.4f}" if "loss" in status else ""
    print(f"{run.name:<48} {status['state']:<10} {step:<14} {loss} {status.get('error', '')}".rstrip())
    return status["state"] == "completed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
