"""`mlflow.json` of a run folder: what MLflow needs beyond the other files, and how much has been sent."""

from __future__ import annotations

import logging
import threading
import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mft.files.json_file import read_json, write_json

log = logging.getLogger(__name__)

NAME = "mlflow.json"


@dataclass
class Record:
    """No field is ever None. A file of an earlier version lacks some, and those keep their defaults.

    Dicts are replaced, never changed: the training's thread may save while the sender's is at work.
    """

    key: str = ""
    """The run's own name for itself, its tag `run_key`: finds a run whose creation was never answered."""

    experiment: str = "default"
    """Name of the MLflow experiment."""

    run_name: str = ""
    """Name of the run in MLflow's table; empty = MLflow makes one up."""

    started: int = 0
    """When the run was first opened; milliseconds since 1970, as all times of MLflow."""

    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the latest attempt, credentials hidden."""

    outcome: str = ""
    """finished, failed or stopped once the tracker was closed; empty while it is open, and after a kill."""

    register_as: str = ""
    """Name of the registered model that final/ becomes a version of; empty = the model is not uploaded."""

    checkpoints: bool = False
    """Whether checkpoints that the run kept are uploaded when it ends."""

    uri: str = ""
    """Address of the store, without credentials. The fields below say what that store has received."""

    run_id: str = ""
    """Of the run in that store; empty = not created yet."""

    ended: str = ""
    """The outcome that the store was given; empty = it shows the run as running."""

    places: dict[str, list[int]] = field(default_factory=dict)
    """File of metrics → [its inode, bytes sent, time in ms of the last row]; a resume rewrites the file."""

    uploaded: dict[str, int] = field(default_factory=dict)
    """File, folder, `data sets` or `models` → the latest change in ns of the files it was made of, as it was
    sent; what has changed is sent again."""

    def __post_init__(self) -> None:
        self.key = self.key or uuid.uuid4().hex
        self._saving = threading.Lock()

    @classmethod
    def read(cls, run_dir: Path) -> Record:
        """Reads the record of a run folder; a damaged one is renamed, with a warning, and a new one made."""
        path = run_dir / NAME
        if not path.exists():
            return cls()
        values: dict[str, Any] = {k: v for k, v in read_json(path).items() if v is not None}
        kinds = {f.name: type(getattr(_EMPTY, f.name)) for f in fields(cls) if f.name in values}
        if "uri" in kinds and all(type(values[name]) is kind for name, kind in kinds.items()):
            return cls(**{name: values[name] for name in kinds})
        path.replace(path.with_name(f"{NAME}.damaged"))
        log.warning("%s is damaged: renamed to %s.damaged; MLflow gets the run as a new one", path, NAME)
        return cls()

    def save(self, run_dir: Path) -> None:
        """Writes the record; at any moment the file is the old or the new one."""
        with self._saving:
            write_json(run_dir / NAME, asdict(self), durable=True)

    def restart(self, uri: str) -> None:
        """Forgets what has arrived: the run goes to another store, or the store has lost it."""
        self.uri, self.run_id, self.ended, self.places, self.uploaded = uri, "", "", {}, {}


def read_config(run_dir: Path) -> dict[str, Any]:
    """Returns the frozen config of a run folder; {} where there is none, as in the folder of a sweep."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


_EMPTY = Record()
