"""What MLflow does must not stop an evaluation."""

import logging

from ttt_megatron.evaluation.tracking import log_evaluation


def test_a_server_that_is_down_is_warned_about(caplog):
    logger = logging.getLogger("ttt_megatron.evaluation.tracking")
    logger.addHandler(caplog.handler)
    try:
        assert not log_evaluation("http://127.0.0.1:9", "0" * 32, {"on/total": 1.0}, 3, [])
    finally:
        logger.removeHandler(caplog.handler)
    assert "MLflow at http://127.0.0.1:9 did not take the evaluation" in caplog.text
