"""Where a model comes from, a folder or the hub, and what is read of it without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.model import model_folder
from mft.model.loading import Pretrained
from mft.model.model_folder import read_config
from mft.model.quantised_checkpoint import WeightFormat, weight_format

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass
class CheckpointSource:
    """A folder or a hub name, and what of it decides how it is read."""

    path: str
    """Folder with config.json, *.safetensors and tokenizer, or hub name owner/name."""

    revision: str | None = None
    """Branch, tag or commit of a hub name; None = main."""

    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""

    hint: str = ""
    """What to do when a local path is missing, appended to the error."""

    def _folder_config(self) -> dict[str, Any]:
        """Returns config.json of a local folder unchanged, {} for a hub name or an empty path."""
        return read_config(Path(self.path).expanduser()) if self.path else {}

    def location(self) -> str:
        """Returns where the checkpoint lies: an absolute folder, or the hub name."""
        path = Path(self.path).expanduser()
        return str(path.resolve()) if path.is_dir() else self.path

    def source(self) -> str:
        """Returns what is loaded: the location, or a native folder made of what lies there."""
        return self.location()

    def conversion(self) -> str:
        """Returns the arguments of `mft convert` that make `source` of `location`, "" where both are one."""
        return ""

    def fingerprint(self) -> str:
        """Returns a string that differs for different weights: a hash of config, file names, sizes,
        safetensors headers and samples of their bytes for a folder; name@revision for a hub name."""
        folder = Path(self.location())
        if folder.is_dir():
            return model_folder.folder_fingerprint(folder)
        return f"{self.path}@{self.revision or 'main'}"

    def fingerprints(self) -> dict[str, str]:
        """Returns the hashes of all that is read of the model, by name (see `mft.config.identity.CONTENTS`).

        `fingerprint` is what adapters have in their mft.json; for a run more of the weights is read. Of a hub
        name there is only that.
        """
        folder = Path(self.location())
        if not folder.is_dir():
            return {"base model": self.fingerprint()}
        return model_folder.fingerprints(folder, self.fingerprint(), self.trust_remote_code)

    def width(self) -> int | None:
        """Returns the hidden size, as far as the config.json of a folder tells."""
        size = self._folder_config().get("hidden_size")
        return size if isinstance(size, int) else None

    def weight_format(self) -> WeightFormat:
        """Returns how the weights are stored, judged without loading any: a folder by its config.json and the
        headers of its files, a hub name by its config. Raises UserError for what cannot be read."""
        folder, who = Path(self.location()), f"model.path={self.path}"
        if folder.is_dir():
            return weight_format(who, read_config(folder), folder)
        return weight_format(who, self.config().to_dict(), None)

    def _pretrained(self, source: str) -> Pretrained:
        return Pretrained(self.path, source, self.revision, self.trust_remote_code)

    def config(self) -> PreTrainedConfig:
        """Returns the transformers config of the model."""
        from transformers import AutoConfig

        return self._pretrained(self.location()).read(AutoConfig)

    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer as the checkpoint has it; UserError for a folder without one."""
        from transformers import AutoTokenizer

        model_folder.check_vocabulary(self.path, Path(self.location()))
        return self._pretrained(self.location()).read(AutoTokenizer)
