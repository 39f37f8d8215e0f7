"""`losslens compare A B …`: compares adapters made anywhere, without training and without rollouts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from losslens.cli.adapter_places import folder_at, label_of, published_adapters
from losslens.config.base import check_name, expand_home
from losslens.core import jobs  # noqa: F401  # its settings must precede other imports
from losslens.core.errors import InputError
from losslens.core.extras import format_error, missing_extra, require_extras
from losslens.core.redaction import guard_streams

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Most adapters of which every pair is measured in full by default; more take minutes.
_MANY = 64


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    found = _Parser(
        prog="losslens compare",
        description="Compares the weight updates of PEFT adapters and of whole models of one architecture: norms, "
        "cosines, principal angles, each beside its null, in tables and a report. Nothing is trained, and no model is "
        "loaded without --base.",
        epilog="Exit status: 0 done; 2 invalid input, or the hub cannot be reached.",
    )
    found.add_argument(
        "adapters", nargs="*", metavar="ADAPTER",
        help="a folder of PEFT or transformers, a run of LossLens, or a hub id (owner/name, owner/name/folder, "
        "owner/name@revision); NAME=ADAPTER names it in the tables",
    )  # fmt: skip
    found.add_argument(
        "--published", nargs="?", const="", metavar="PLACE", help="also every adapter of a repository on the hub, or "
        "of a folder laid out like one, beside the figures of arXiv 2606.23740; by default that study's own repository",
    )  # fmt: skip
    found.add_argument(
        "--base", metavar="MODEL", help="folder or hub id of the base: adds what needs its weights; "
        "DoRA and whole models need it",
    )  # fmt: skip
    found.add_argument(
        "--completions", metavar="FOLDER", help="frozen rollouts; with --base, adds barriers, CKA, KL and output shifts"
    )
    found.add_argument(
        "--measures", choices=("all", "cosines"), help="cosines: norms, cosines, a map and clusters alone, for "
        f"hundreds of adapters; default: all for up to {_MANY} adapters, else cosines",
    )  # fmt: skip
    found.add_argument(
        "--precision", choices=("float32", "int8"), help="of --measures cosines: float32, the default, is within 1e-6; "
        "int8 takes a third of the time for hundreds of adapters, on processors with VNNI, and is within about 1e-4 "
        "for ordinary adapters, up to 1e-3 with outlier columns (measured on some of the pairs and written into "
        "manifest.json); needs torch",
    )  # fmt: skip
    found.add_argument("--output-dir", metavar="FOLDER", default="outputs", help="default: outputs")
    return found


def main(arguments: list[str]) -> int:
    """Compares adapters, prints the tables and the path of the report, and returns the exit status."""
    command_line = parser()
    guard_streams()
    asked = command_line.parse_args(arguments)
    if not asked.adapters and asked.published is None:
        command_line.error("the following arguments are required: ADAPTER")
    if asked.completions and not asked.base:
        command_line.error("--completions needs --base")
    if asked.base == "":
        command_line.error("--base: names no model")
    if asked.measures == "cosines" and asked.base:
        command_line.error("--measures cosines uses no base: leave out --base")
    try:
        require_extras("report")
        report = _compare(asked)
    except InputError as error:
        print(format_error(command_line.prog, error), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        needed = missing_extra(error)
        if needed is None:
            raise
        print(format_error(command_line.prog, needed), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(report)
    return 0


def _compare(asked: argparse.Namespace) -> Path:
    from losslens.report.page import write_report
    from losslens.updates.checkpoint import needs_base

    output_dir = _folder_argument("--output-dir", asked.output_dir)
    folders = _folders(asked.adapters)
    published = {} if asked.published is None else published_adapters(asked.published)
    for name in folders.keys() & published.keys():
        raise InputError(f"{name}: also the name of a published adapter; give NAME=ADAPTER")
    folders |= published
    measures = asked.measures
    if measures is None and len(folders) > _MANY and asked.base is None:
        measures = "cosines"
        print(f"{len(folders)} adapters: norms, cosines, map and clusters alone; --measures all adds angles and layers")
    if asked.precision and measures != "cosines":
        raise InputError("--precision needs --measures cosines")
    if asked.published is not None:
        from losslens.report.published import write_published

        writers: tuple[Callable[[Path], object], ...] = (write_published, write_report)
    else:
        writers = (write_report,)
    if measures == "cosines":
        for name, folder in folders.items():
            if needs_base(folder):
                raise InputError(f"{name}: only LoRA has cosines alone; give --measures all and --base")
        from losslens.analysis.adapter_map import map_adapters

        found = map_adapters(folders, Path(output_dir), *writers, precision=asked.precision or "float32")
        return found / "report.html"
    from losslens.analysis.pipeline import analyze_job

    return analyze_job(_config(folders, asked.base, asked.completions, output_dir), *writers) / "report.html"


def _parted(adapter: str) -> tuple[str, str]:
    """Parts NAME=ADAPTER; the names of folders may hold a `=`, too. The name is empty if none is given."""
    if folder_at(adapter) or "=" not in adapter:
        return "", adapter
    parts = adapter.split("=")
    splits = [("=".join(parts[:n]), "=".join(parts[n:])) for n in range(1, len(parts))]
    return next(((name, place) for name, place in splits if place and folder_at(place)), splits[0])


def _config(folders: dict[str, Path], base: str | None, completions: str | None, output_dir: str) -> DictConfig:
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    from losslens.config import interpolations  # noqa: F401  # registers what conf/ refers to
    from losslens.config.folders import conf_folder

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config: DictConfig = compose(
            "analyze", ["sweep=null", "logger=none", f"pairs={'all' if completions else 'none'}"]
        )
    with open_dict(config):
        config.adapters = {name: str(folder) for name, folder in folders.items()}
        config.output_dir = output_dir
        config.model_path = base
        config.probe_set.completions = completions
    return config


def _folder_argument(argument: str, value: str) -> str:
    """Returns the path that an argument names.

    Raises:
        InputError: It is not one.
    """
    try:
        return str(expand_home(value))
    except ValueError as error:
        raise InputError(f"{argument}: {error}") from error


def _checked_name(adapter: str, name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise InputError(f"ADAPTER {adapter}: {error}") from error


def _folders(adapters: list[str]) -> dict[str, Path]:
    """Returns the folder of each adapter by its name in the tables, in the order of the command line."""
    from losslens.core.hub import adapter_from_hub
    from losslens.updates.places import named_adapters

    found = []
    for adapter in adapters:
        name, place = _parted(adapter)
        if not place:
            raise InputError(f"ADAPTER {adapter}: names no folder and no hub id")
        found.append((name, folder_at(place) or adapter_from_hub(place)))
    derived = iter(named_adapters([folder for name, folder in found if not name]))
    named: dict[str, Path] = {}
    for name, folder in found:
        label = _checked_name(adapter, name) if name else label_of(next(derived))
        if label in named:
            raise InputError(f"two adapters are named {label}; give NAME=ADAPTER")
        named[label] = folder
    return named_adapters(named)
