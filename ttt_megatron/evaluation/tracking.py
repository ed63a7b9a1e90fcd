"""An evaluation in the MLflow run that trained the model."""

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

_FOLDER = "evaluation"


def log_evaluation(
    uri: str, run_id: str, metrics: Mapping[str, float], step: int, files: Sequence[Path]
) -> bool:
    """Logs figures at `step` and files to a run; returns whether that worked.

    Never raises for what MLflow, its store or the network does: it warns, and the files stay where
    they are.
    """
    # A server that is down is to be noticed within seconds; MLflow would try for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        now = int(time.time() * 1000)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        client.log_batch(
            run_id,
            metrics=[Metric(f"{_FOLDER}/{n}", v, now, step) for n, v in finite.items()],
        )
        for path in files:
            client.log_artifact(run_id, str(path), _FOLDER)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        logger.warning(
            "MLflow at %s did not take the evaluation (%s: %s)", uri, type(error).__name__, reason
        )
        return False
    return True
