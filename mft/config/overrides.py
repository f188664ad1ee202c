"""The overrides of a command line: checked before Hydra composes anything, and reported where they have no
effect."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mft.config.inputs import under
from mft.config.other_trainers import setting_here
from mft.config.places import check_name
from mft.config.schema import Config, Launch, config_dir
from mft.console import credentials
from mft.data.settings import DataSettings
from mft.errors import UserError, nearest, shortened
from mft.training.settings import TrainSettings

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

SEVERAL = ("task", "tracking")
"""Groups of which several options can be chosen."""

KEPT = {field.name for field in dataclasses.fields(Config)} - set(SEVERAL) | {"hydra", "schema"}
"""Nodes that every run needs."""

DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
"""What word processors and web pages turn a hyphen into."""

HONOURED = ("hydra.run.dir", "hydra.searchpath")
"""Hydra's settings that have an effect on one run; `hydra/launcher` counts as `hydra.launcher`."""

HONOURED_IN_SWEEPS = (
    *("hydra.sweep.dir", "hydra.searchpath", "hydra.mode", "hydra.verbose", "hydra.sweeper"),
    *("hydra.launcher", "hydra.callbacks", "hydra.hydra_logging"),
)
"""The same for a sweep on this machine; launchers of other packages read further ones."""

HYDRA_VALUES = ("hydra.verbose", "hydra.mode", "hydra.searchpath", "hydra.output_subdir")
"""Keys right below `hydra` that hold a value; the others are mappings, without which Hydra does not start."""

HYDRA_INSTEAD = {
    "hydra.sweep.dir": "it is for sweeps (-m); output_dir=… is the folder of one run",
    "hydra.run.dir": "a sweep's jobs have folders of their own; hydra.sweep.dir=… is the sweep's folder",
    "hydra.job.chdir": "runs stay in the folder they were started in",
    "hydra.mode": "-m starts a sweep",
}
"""Why some of Hydra's settings have no effect."""

MOVED_KEYS = {
    "train.fail_fast": "launch.fail_fast",
    "train.prune": "launch.prune",
    "train.prune_after": "launch.prune_after",
}
"""Keys of earlier versions → where they are now; the old ones are refused with the new name."""

DEEPEST = 64
"""Brackets that a value on the command line may have; Hydra's parser recurses for each."""

IN_PLAIN_TEXT = (
    "{}: {} a user, a password or a key, and configs are kept with the run; write it as "
    "${{oc.env:NAME}}, which is kept as written and read in every rank, or, for MLflow, set "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment."
)
"""The sentence for a secret in a config."""


def in_plain_text(key: str) -> str:
    """Returns the sentence for a password or key that stands in a config; it does not repeat the secret."""
    return IN_PLAIN_TEXT.format(key, "this is" if credentials.SECRET_KEY.search(key) else "the address holds")


def key_of(override: str) -> str:
    """Returns what an override sets."""
    return override.split("=", 1)[0].lstrip("+~")


def with_moved_keys(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides of a recorded command, keys of earlier versions replaced by their current
    names."""
    return [o.replace(key_of(o), MOVED_KEYS.get(key_of(o), key_of(o)), 1) for o in overrides]


def groups() -> list[str]:
    """Returns the names of the config groups."""
    return sorted(path.name for path in config_dir().iterdir() if path.is_dir())


def group_options(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """Returns the options of a group in conf/ and `folders`, without the yamls of conf/ that options
    share."""
    names = {path.stem for folder in (config_dir(), *folders) for path in (folder / group).glob("*.yaml")}
    return sorted(name for name in names if not is_base(group, name))


def is_base(group: str, name: str) -> bool:
    """Whether a yaml of conf/ is a base that options of its group share (data/base, model/_base)."""
    return (name == "base" or name.startswith("_")) and (config_dir() / group / f"{name}.yaml").is_file()


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises UserError for overrides that Hydra cannot read or answers with a traceback, and for those that
    remove what every run needs, replace Hydra's own nodes or contain a password."""
    for override in overrides:
        key = key_of(override).strip()
        # Before anything below repeats the override in a sentence.
        if credentials.written_out(override.partition("=")[2], key):
            raise UserError(in_plain_text(key))
        _check_characters(override)
        # Counted before parsing: brackets that are never closed are nested just as deeply.
        if max(map(override.count, "[{(")) > DEEPEST:
            raise UserError(f"{shortened(key)}: its value has too many brackets; expected at most {DEEPEST}.")
        parsed = _parsed(override)
        below_hydra = key.startswith("hydra.") and key.count(".") == 1 and key not in HYDRA_VALUES
        if key == "hydra" or below_hydra or under(key, ("hydra.runtime", "hydra.overrides")):
            raise UserError(
                f"{override}: {key} belongs to Hydra and cannot be replaced; the folder of a run is "
                "output_dir=…, that of a sweep hydra.sweep.dir=…"
            )
        group = parsed.key_or_group
        if parsed.is_delete():
            if group in KEPT:
                raise UserError(
                    f"{override}: {group} cannot be removed, since every run needs it; set {group}=… instead."
                )
        elif group == "name" and isinstance(name := parsed.value(), str) and "${" not in name:
            check_name(name)  # before a sweep makes a folder of it
        elif (config_dir() / group).is_dir() and not parsed.package and not parsed.is_sweep_override():
            _check_choice(override, group, parsed.value())


def replaced(overrides: Sequence[str]) -> list[str]:
    """Returns a sentence for every key that is set more than once; the last value wins."""
    last = {key_of(o): o for o in overrides}
    times = Counter(map(key_of, overrides))
    return [f"{key} is set {times[key]} times; {last[key]} is used." for key in last if times[key] > 1]


def of_hydra(overrides: Sequence[str], sweep: bool) -> list[str]:
    """Returns a sentence for every setting of Hydra's own that has no effect, in a run or in a sweep."""
    if sweep and any(key_of(o) == "hydra/launcher" and not o.endswith("=mft") for o in overrides):
        return []  # what launchers of other packages read is not known here
    notes = []
    for override in overrides:
        key = key_of(override).replace("/", ".")
        if not under(key, ("hydra",)) or under(key, HONOURED_IN_SWEEPS if sweep else HONOURED):
            continue
        reason = f"mft {'runs sweeps' if sweep else 'composes runs'} without this part of Hydra"
        if not sweep and under(key, ("hydra.sweeper", "hydra.launcher", "hydra.sweep")):
            reason = "it is for sweeps (-m)"
        notes.append(f"{override} has no effect: {HYDRA_INSTEAD.get(key, reason)}.")
    return notes


def with_output_dir(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides of one run with `hydra.run.dir`, as users of Hydra write it, as `output_dir`.

    Raises UserError where both are set.
    """
    if {"hydra.run.dir", "output_dir"} <= set(map(key_of, overrides)):
        raise UserError("hydra.run.dir and output_dir both name the run folder; keep output_dir.")
    return [re.sub(r"^\+*hydra\.run\.dir=", "output_dir=", o) for o in overrides]


def not_an_override(word: str) -> str:
    """Returns the sentence for a word without `=`, with what was probably meant."""
    if word and word[0] in DASHES:
        dash = unicodedata.name(word[0]).lower()
        return f"{word!r} starts with {dash}, not with a hyphen; write --{word.lstrip(DASHES)}."
    if options := [f"{group}={word}" for group in groups() if word in group_options(group)]:
        meant = options[0]
    elif Path(word).suffix in (".yaml", ".yml"):
        meant = f"--config-dir DIR experiment={Path(word).stem}"
    elif "/" in word or (word and Path(word).exists()):
        meant = f"data.paths=[{word}]"
    else:
        name, _, value = word.replace(":", " ").partition(" ")  # optimizer.lr:1e-4
        key = _setting(name) or (name if name in groups() or "." in name else "")
        meant = f"{key}={value.strip() or '…'}" if key else ""
    hint = f"did you mean {meant}?" if meant else "use key=value, such as peft=lora or optimizer.lr=2e-4."
    return f"{word!r} is not a valid override; {hint}"


def unknown_flag(flag: str, flags: Sequence[str], command: str) -> str:
    """Returns the sentence for an unknown flag of a command with overrides, which may be meant as one."""
    name, equals, value = flag.lstrip("-").partition("=")
    hint = nearest(flag.partition("=")[0], flags)
    # Users of other trainers write --learning_rate=1e-4, an override here.
    if not hint and (equals or "." in name or _setting(name)):
        ours = _setting(name) or name
        meant = ours if "=" in ours else f"{ours}={value or '…'}"
        hint = f"; did you mean {meant}, without dashes?"
    return f"{command} has no flag {shortened(flag)[1:-1]}{hint or '.'} Flags: {', '.join(flags)}."


def _setting(name: str) -> str:
    """Returns the key of a setting that a person calls by its last name, or as another trainer does; ""."""
    typed = {"train": TrainSettings, "data": DataSettings, "launch": Launch}
    fields = [(path, field.name) for path, cls in typed.items() for field in dataclasses.fields(cls)]
    return next((f"{path}.{field}" for path, field in fields if field == name), setting_here(name) or "")


def _check_characters(override: str) -> None:
    """Refuses invisible characters, such as those that come with text copied from a web page."""
    key, equals, value = override.partition("=")
    for place, text in (("key", key), ("value", value)):
        for letter in text:
            category = unicodedata.category(letter)
            # the two that are let through join letters and emoji
            hidden = category in ("Cf", "Cc") and letter not in "\t\n\u200c\u200d"
            if hidden or (place == "key" and (letter.isspace() or category[0] == "Z")):
                name = unicodedata.name(letter, "control character").lower()
                raise UserError(
                    f"{shortened(override)}: its {place} contains {name} (U+{ord(letter):04X}); remove it."
                )
    if equals and key_of(override)[:1] in ("", "@"):
        raise UserError(f"{override}: the key before = is missing; use key=value, such as optimizer.lr=2e-4.")
    if not override.isprintable() and "\n" not in override and "\t" not in override:
        raise UserError(f"{shortened(override)}: contains bytes that are not text in UTF-8.")


def _parsed(override: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except RecursionError:
        raise UserError(f"{shortened(override)}: brackets are nested too deeply.") from None
    except ValueError as error:  # Python reads integers of at most 4,300 digits
        raise UserError(f"{shortened(override)}: {error}.") from error
    except HydraException as error:
        key = override.partition("=")[0]
        if not re.fullmatch(r"(\+{1,2}|~)?[\w$]([\w$@:-]|[./](?=[\w$]))*", key):
            raise UserError(
                f"{shortened(override)}: {key!r} is not a key; a key is names joined by dots, such as "
                "train.max_steps."
            ) from error
        reason = shortened(str(error).splitlines()[0].strip(), 120)[1:-1]
        letters = "" if override.isascii() else ", letters such as é"
        quoted = f"brackets, commas{letters}, ~ or ="
        raise UserError(
            f"{shortened(override, 300)[1:-1]}: cannot be read ({reason}). Close brackets and quotes, and "
            f'quote text that holds {quoted}: \'data.paths=["~/a,b","c=d"]\'.'
        ) from error


def _check_choice(override: str, group: str, value: object) -> None:
    """Refuses what Hydra would look up as a file and not find, or find outside the group."""
    words = value if isinstance(value, list) else [value]
    several = isinstance(value, list) and group not in SEVERAL
    trackers_and_none = group == "tracking" and "none" in words and len(words) > 1
    wrong = several or trackers_and_none
    for word in words:
        wrong |= word is None or word == "" or isinstance(word, int | float)
        wrong |= isinstance(word, str) and (word.startswith("/") or ".." in word or is_base(group, word))
    if wrong:
        options = group_options(group)
        hint = next((nearest(word, options) for word in words), "") if several else ""
        takes = "one option" if several else "the name of an option"
        takes = "none, or names of trackers" if trackers_and_none else takes
        raise UserError(f"{override}: {group} takes {takes}{hint or '.'} Allowed: {', '.join(options)}.")
