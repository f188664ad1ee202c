"""Tasks as data sets of a real store."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mft.files.json_file import read_json, write_json
from mft.tracking.datasets import dataset_inputs
from mft.tracking.record import Record
from mft.tracking.sender import sync
from mft.tracking.store import client_for
from mft.tracking.uploads import Uploads
from tests.tracking.folders import write_run


def sent(run_dir):
    record = Record.read(run_dir)
    inputs = client_for(record.uri).get_run(record.run_id).inputs.dataset_inputs
    return {i.dataset.name: (i.dataset, {tag.key: tag.value for tag in i.tags}) for i in inputs}


def test_a_task_is_a_data_set_with_its_counts(tmp_path, store, request):
    run_dir = write_run(tmp_path / "run", f"sqlite:///{store}/mlflow.db", experiment=request.node.name)
    sync(run_dir)
    datasets = sent(run_dir)
    assert list(datasets) == ["docs", "code"]
    docs, tags = datasets["docs"]
    assert tags == {"mlflow.data.context": "training, validation"}
    assert docs.source_type == "local" and json.loads(docs.source)["uri"] == "/data/docs"
    profile = json.loads(docs.profile)
    assert (profile["rows"], profile["train_rows"], profile["valid_tokens"]) == (44, 40, 4)
    assert "test_rows" not in profile
    assert docs.digest.startswith(read_json(run_dir / "identity.json")["fingerprints"]["task.docs"][:8])
    write_json(run_dir / "mlflow.json", read_json(run_dir / "mlflow.json") | {"uploaded": {}})
    sync(run_dir)
    assert sent(run_dir) == datasets


def test_the_digest_tells_what_the_run_took_of_the_rows(tmp_path):
    one, other = (write_run(tmp_path / name, "") for name in ("one", "other"))
    accounts = read_json(other / "report" / "data.json")
    accounts["docs"]["sizes"]["train"]["tokens"] = 1234  # as another tokenizer counts them
    write_json(other / "report" / "data.json", accounts)
    first, second = (dataset_inputs(folder) for folder in (one, other))
    assert first["code"].dataset.digest == second["code"].dataset.digest
    assert first["docs"].dataset.digest != second["docs"].dataset.digest
    assert first["docs"].dataset.digest[:8] == second["docs"].dataset.digest[:8]


@pytest.mark.parametrize("damaged", ["", "[]", '{"docs": 3, "code": {"paths": 7, "sizes": []}}'])
def test_a_damaged_account_stops_nothing(tmp_path, store, damaged, request):
    uri = f"sqlite:///{store}/mlflow.db"
    run_dir = write_run(tmp_path / "run", uri, experiment=request.node.name)
    (run_dir / "report" / "data.json").write_text(damaged)
    sync(run_dir)
    assert Record.read(run_dir).ended == "finished" and sync(run_dir) == (0, False)


def test_names_and_paths_may_be_anything(tmp_path, store, request):
    tasks = ["a/b", "<b>|`x`", "pass@1 [x]=é", "t" * 200, "'; DROP TABLE runs; --"]
    uri = f"sqlite:///{store}/mlflow.db"
    tags = {"name": "<i>`run`</i>|" + "n" * 300}
    run_dir = write_run(tmp_path / "run", uri, tasks, experiment=request.node.name, tags=tags)
    accounts = read_json(run_dir / "report" / "data.json")
    for task in tasks:
        accounts[task]["paths"] = [f"/data/{number}/" + "p" * 300 for number in range(500)]
    write_json(run_dir / "report" / "data.json", accounts)
    sync(run_dir)
    assert list(sent(run_dir)) == tasks
    record = Record.read(run_dir)
    client = client_for(record.uri)
    run = client.get_run(record.run_id)
    (model,) = [m for m in client.search_logged_models([run.info.experiment_id]) if m.name == "final"]
    assert len(model.metrics) == len(tasks) + 1 and len(run.outputs.model_outputs) == 4


class Unknown(BaseHTTPRequestHandler):
    """Answers as a server does that is too old for what it is asked."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_an_older_server_goes_without_and_is_not_asked_again(tmp_path, caplog):
    run_dir = write_run(tmp_path / "run", "")
    (run_dir / "config.yaml").unlink()
    record = Record.read(run_dir)
    record.run_id = "0" * 32
    with ThreadingHTTPServer(("127.0.0.1", 0), Unknown) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = client_for(f"http://127.0.0.1:{server.server_port}")
        uploads = Uploads(client, run_dir, record, lambda _: None)
        assert uploads.send() == uploads.send() == 0
        server.shutdown()
    assert [r.message for r in caplog.records if r.name.startswith("mft")] == [
        "The MLflow server is older than 2.4 and keeps no data sets of runs"
    ]
