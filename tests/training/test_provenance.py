"""provenance.json: what a tracker gets as tags, and how it has changed when a run goes on elsewhere."""

from __future__ import annotations

from pathlib import Path

from mft.console.credentials import remember
from mft.files.json_file import read_json
from mft.training import provenance


def test_the_tags_of_this_machine() -> None:
    tags = provenance.tags("cpu", 2)
    assert tags["ranks"] == "2" and tags["device"] and tags["host"] and tags["version.torch"][0].isdigit()


def test_secrets_are_hidden_and_the_first_start_is_kept(tmp_path: Path) -> None:
    remember("s3cr3t-word", "WORD")
    first = provenance.recorded(tmp_path, {"command": "mft train x=s3cr3t-word", "host": "a"})
    assert first["command"] == "mft train x=${oc.env:WORD}" and "T" in first["started"]
    assert read_json(tmp_path / provenance.NAME) == first
    again = provenance.recorded(tmp_path, {"host": "a"})
    assert again["started"] == first["started"] and "changed.host" not in again
    provenance.recorded(tmp_path, {"host": "b"})
    third = provenance.recorded(tmp_path, {"host": "c"})
    assert third["changed.host"] == "a -> b -> c" and third["host"] == "c"
    assert provenance.recorded(tmp_path, {"host": "c"})["changed.host"] == "a -> b -> c"
