"""Validates `model.path` (local folder or hub id) without loading weights, and fingerprints what is read of
it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mft.errors import UserError, nearest, nearest_sibling, shortened
from mft.model.safetensors_header import check_files
from mft.model.transformers_private import known_model_type, model_types

if TYPE_CHECKING:
    import xxhash


def check_path(path: str, hint: str = "", weights: bool = True) -> None:
    """Raises UserError unless `path` is a model folder or may be a hub name.

    hint: what to do when a folder is missing; weights: whether the folder has to hold them.
    """
    if not path:
        raise UserError("model.path is empty; give a folder or a hub name such as owner/name.")
    folder, who = Path(path).expanduser(), f"model.path={path}"
    # Meant as a folder, not a hub name: anchored, deeper than owner/name, or inside an existing folder.
    local = path.startswith(("/", "./", "../", "~", "\\")) or path.count("/") > 1
    if folder.is_dir():
        _check_folder(who, folder, weights)
    elif folder.exists():
        raise UserError(f"{who} is a file; give the folder that holds config.json")
    elif local or ("/" in path and Path(path).parent.is_dir()):
        raise UserError(f"{who} does not exist{f'; {hint}' if hint else nearest_sibling(folder)}")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(f"model.path={shortened(path)} is neither a folder nor a hub name such as owner/name")


def check_reachable(path: str, revision: str | None) -> None:
    """Raises UserError for a hub name that is not in the cache where the hub must not be asked."""
    from huggingface_hub import try_to_load_from_cache

    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return
    if not isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
        raise UserError(
            f"model.path={path} is neither a folder nor in the hub's cache, and HF_HUB_OFFLINE keeps it from "
            "being fetched; unset the variable, or give the model's folder."
        )


def is_config_alone(path: str) -> bool:
    """Whether a path is a folder with a config.json and without weights that could be loaded."""
    folder = Path(path).expanduser()
    return bool(path) and (folder / "config.json").is_file() and not any(folder.glob("*.safetensors"))


def _check_folder(who: str, folder: Path, weights: bool) -> None:
    config, adapter = ((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    if adapter and not config:
        raise UserError(f"{who} holds an adapter; give its base model, and the adapter as peft.path")
    if not config:
        raise UserError(f"{who} has no config.json, so it is not a Hugging Face model folder")
    if adapter:  # transformers would load the base that it names
        raise UserError(
            f"{who} holds an adapter_config.json beside its config.json, for which transformers would load "
            "another base; move the adapter's files elsewhere, and give that folder as peft.path"
        )
    read_config(folder)
    if not weights:
        return
    if not any(folder.glob("*.safetensors")):
        pickled = f"; pickled weights are not loaded: run mft convert {folder}"
        raise UserError(f"{who} has no *.safetensors file{pickled if any(folder.glob('*.bin')) else ''}")
    check_files(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns config.json of a folder, {} if absent; UserError unless it holds a JSON object."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} must be a JSON object, found {type(values).__name__}")
    return values


VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
"""Files that vocabularies come in."""


def check_vocabulary(path: str, folder: Path) -> None:
    """Raises UserError for a model folder without any vocabulary."""
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):
        names = f"{', '.join(VOCABULARIES[:-1])} or {VOCABULARIES[-1]}"
        raise UserError(f"model.path={path} has no tokenizer: no {names}; copy the files of its release")


ORIGINAL_FORMATS = {
    "chatglm": "model=chatglm2, chatglm3 or codegeex2",
    "qwen": "model=qwen",
    "baichuan": "model=baichuan",
    "aquila": "model=aquila2",
}
"""Model types of checkpoints that shipped their own code, and the choice that loads them natively."""


def check_type(path: str, own_code: bool) -> None:
    """Raises UserError for a folder whose model type is missing or unknown, and for one in an original
    format, with the choice that reads it; own_code: whether code of the folder may be run, which may bring a
    type of its own."""
    values = read_config(Path(path).expanduser())
    if not values:  # a hub name
        return
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"model.path={path}: its config.json has no model_type")
    if kind in ORIGINAL_FORMATS:
        raise UserError(
            f"model.path={path} is a {kind} checkpoint in its original format, which transformers cannot "
            f"read; choose {ORIGINAL_FORMATS[kind]} with the same model.path"
        )
    # By a look at the folders of transformers first: the full list takes its import, and has some types more.
    known = kind.startswith("mft_") or own_code or known_model_type(kind) or kind in model_types()
    if not known:
        code = "; it comes with code of its own, which model.trust_remote_code=true would run"
        raise UserError(
            f"model.path={path}: transformers has no model type {kind!r}, which its config.json names"
            f"{code if 'auto_map' in values else ''}{nearest(kind, model_types())}"
        )


def no_packing(path: str, layers: str, model: str = "") -> str:
    """Returns the sentence that refuses rows of several samples, for recurrent layers or for a class whose
    attention ignores positions."""
    if layers:
        reason = f"{layers} carry a state from token to token, so samples of one row would see each other"
    else:
        reason = f"{model} lets the samples of one row see each other"
    return f"model.path={path}: {reason}; choose data=pad, which gives every sample a row of its own"


TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*",
    "generation_config.json",
)
"""Files of a model folder, beside config and weights, that decide what is trained or what is saved with
it."""


def contents_fingerprint(folder: Path, patterns: Sequence[str]) -> str:
    """Returns a hash over the names and contents of the files of a folder that match one of the patterns."""
    import xxhash

    digest = xxhash.xxh3_128()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
        content = file.read_bytes()
        digest.update(json.dumps([file.relative_to(folder).as_posix(), len(content)]).encode())
        digest.update(content)
    return digest.hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """Returns a hash over the config and weight files of a folder; of each safetensors file its header and 64
    samples of 4 KiB, so that another training of the same architecture differs, in milliseconds instead of a
    full read."""
    import xxhash

    digest = xxhash.xxh3_128()
    digest.update((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as stream:
            header = min(int.from_bytes(stream.read(8), "little"), size)  # of a damaged file it is any number
            digest.update(stream.read(header))
            _update_with_samples(digest, stream, 8 + header, size)
    return digest.hexdigest()


def _update_with_samples(digest: xxhash.xxh3_128, stream: BinaryIO, start: int, end: int) -> None:
    for i in range(64):
        stream.seek(start + (end - start) * i // 64)
        digest.update(stream.read(4096))


SMALL = 64 << 20
"""Bytes of a weight file that is read in full for a run's identity, in 10 ms; of a larger one samples are."""


def fingerprints(folder: Path, fingerprint: str, own_code: bool) -> dict[str, str]:
    """Returns the hashes of all that a run reads of a model folder, by name.

    own_code: whether code in it is run; fingerprint: `folder_fingerprint` of it, which adapters record in
    their mft.json. Its samples miss the change of a single value, also in a file that is read in no time:
    here small weight files count in full, and pickled ones too.
    """
    import xxhash

    digest = xxhash.xxh3_128(fingerprint.encode())
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as stream:
            if size <= SMALL:
                digest.update(stream.read())
            else:
                _update_with_samples(digest, stream, 0, size)
    hashes = {"base model": digest.hexdigest(), "tokenizer": contents_fingerprint(folder, TOKENIZER_FILES)}
    return hashes | ({"code": contents_fingerprint(folder, ("**/*.py",))} if own_code else {})
