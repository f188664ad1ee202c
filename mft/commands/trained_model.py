"""Finds the model of a run and imports the code of its family, for the verbs that read a trained model."""

from __future__ import annotations

import sys
from pathlib import Path

from mft.commands.arguments import existing_folder
from mft.config import plugins
from mft.console.screen import say
from mft.errors import UserError


def final_folder(run: str) -> Path:
    """Returns where a run's model is: its `final`, else its newest sound checkpoint, else the folder itself.

    Raises UserError where it is damaged, with what to use in its place.
    """
    from mft.files.checksums import require_sound
    from mft.model.generate import model_folder
    from mft.training.resume import newest_sound, none_sound

    folder = existing_folder(run)
    if (folder / "final").is_dir():
        try:
            require_sound(folder / "final")
        except UserError as error:
            checkpoint, _ = newest_sound(folder)
            mend = f" {checkpoint} is sound; train.resume={checkpoint} writes final/ anew."
            raise UserError(f"{error}{mend if checkpoint else ''}") from error
        return model_folder(folder)
    checkpoint, damaged = newest_sound(folder, weights=True)
    if checkpoint is None and damaged:
        raise none_sound(folder, damaged)
    for name, problem in damaged.items():
        say(f"mft: skipping {name}, which is damaged: {problem}", sys.stderr)
    return model_folder(checkpoint or folder)


def import_family(run: str) -> None:
    """Imports the model family of a run where it is a plug-in's, since it may register an architecture."""
    from mft import run_folder
    from mft.config.components import component_class, inside
    from mft.config.schema import load

    folder = Path(run)
    if run_folder.plugins_of(folder) or plugins.allowed():
        model = load(folder).model if (folder / "config.yaml").is_file() else {}
        if not inside(str(model.get("_target_", "mft")), "mft"):
            plugins.name(run_folder.plugins_of(folder))
            component_class(model, "model")
