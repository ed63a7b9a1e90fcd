"""An evaluation in the MLflow run that trained the model."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ttt_megatron.tracking.store import in_words, open_client

logger = logging.getLogger(__name__)

_FOLDER = "evaluation"


def log_evaluation(
    uri: str, run_id: str, metrics: Mapping[str, float], step: int, files: Sequence[Path]
) -> bool:
    """Logs figures at `step` and files to a run; returns whether that worked.

    Never raises for what MLflow, its store or the network does: it warns, and the files stay where
    they are.
    """
    try:
        from mlflow.entities import Metric

        client = open_client(uri)
        now = int(time.time() * 1000)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        client.log_batch(
            run_id,
            metrics=[Metric(f"{_FOLDER}/{n}", v, now, step) for n, v in finite.items()],
        )
        for path in files:
            client.log_artifact(run_id, str(path), _FOLDER)
    except Exception as error:
        logger.warning("MLflow at %s did not take the evaluation (%s)", uri, in_words(error))
        return False
    return True
