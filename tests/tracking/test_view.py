"""The table that a link opens: made once for an experiment, and a person's own version stays."""

import json

from mft.tracking.record import Record
from mft.tracking.sender import sync
from mft.tracking.store import client_for
from mft.tracking.view import VIEW, VIEW_TAG
from tests.tracking.folders import write_run


def test_every_experiment_has_the_view_until_a_person_changes_it(tmp_path, store, request):
    uri, name = f"sqlite:///{store}/mlflow.db", request.node.name
    client = client_for(uri)

    def sent_run(number):
        sync(write_run(tmp_path / f"run{number}", uri, experiment=name))
        return client.get_experiment_by_name(name).tags[VIEW_TAG]

    experiment = client.create_experiment(name)  # of an earlier version
    assert sent_run(1) == VIEW
    assert "metrics.`best/valid/loss`" in json.loads(VIEW)["selectedColumns"]
    client.set_experiment_tag(experiment, VIEW_TAG, "mine")
    assert sent_run(2) == "mine"
    assert Record.read(tmp_path / "run2").ended == "finished"
