"""What MLflow does must not stop an evaluation."""

import logging
import shutil

from mlflow.tracking import MlflowClient

from ttt_megatron.cli.main import main
from ttt_megatron.config import from_dict
from ttt_megatron.evaluation.tracking import log_evaluation, log_to_run
from ttt_megatron.tracking.header import new_header, to_record
from ttt_megatron.tracking.journal import Journal
from ttt_megatron.tracking.state import read_state, write_tracking


def test_a_server_that_is_down_is_warned_about(caplog):
    logger = logging.getLogger("ttt_megatron.evaluation.tracking")
    logger.addHandler(caplog.handler)
    try:
        assert not log_evaluation("http://127.0.0.1:9", "0" * 32, {"on/total": 1.0}, 3, [])
    finally:
        logger.removeHandler(caplog.handler)
    assert "MLflow at http://127.0.0.1:9 did not take the evaluation" in caplog.text


def test_an_evaluation_is_kept_while_the_server_is_away(tmp_path, empty_store):
    run, picture = tmp_path / "run", tmp_path / "elsewhere.png"
    run.mkdir()
    picture.write_bytes(b"a picture")
    assert log_to_run(run, {"on/total": 1.5}, 3, [picture]) is None
    Journal(run / "tracking.jsonl").append([to_record(new_header(from_dict({"name": "r"})))])
    write_tracking(run, "http://127.0.0.1:9", "0" * 32)
    done = log_to_run(run, {"on/total": 1.5}, 3, [picture])
    assert done == f"kept for MLflow: ttt-megatron upload {run}"
    store = tmp_path / "mlflow.db"
    shutil.copy(empty_store, store)
    assert main(["upload", str(run), "--to", f"sqlite:///{store}"]) == 0
    client, run_id = MlflowClient(tracking_uri=f"sqlite:///{store}"), read_state(run).run_id
    (metric,) = client.get_metric_history(run_id, "evaluation/on/total")
    assert (metric.step, metric.value) == (3, 1.5)
    stored = client.list_artifacts(run_id, "evaluation")
    assert [file.path for file in stored] == ["evaluation/elsewhere.png"]
