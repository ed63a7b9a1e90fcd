"""Uploading beside the training."""

import logging
import random
import threading
from pathlib import Path

from ttt_megatron.tracking.store import in_words
from ttt_megatron.tracking.uploader import Uploader

logger = logging.getLogger(__name__)

_GATHER_SECONDS = 2.0
_FIRST_REST, _LONGEST_REST = 2.0, 300.0


class UploadThread:
    """Uploads while the run goes on; rests ever longer while the store is away."""

    def __init__(self, uploader: Uploader, grown: threading.Event, journal: Path) -> None:
        self._uploader = uploader
        self._grown = grown
        self._journal = journal
        self._closing = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="tracking-upload", daemon=True)
        self._thread.start()

    def close(self, patience: float) -> None:
        """Uploads what is left, unless the store is away, for at most `patience` seconds."""
        self._closing.set()
        self._grown.set()
        self._thread.join(patience)
        if not self._thread.is_alive():
            self._uploader.close()

    def _work(self) -> None:
        rest = _FIRST_REST
        while True:
            # In this order: a `close` between the two is not overlooked.
            self._grown.clear()
            closing = self._closing.is_set()
            try:
                while self._uploader.upload_piece():
                    rest = _FIRST_REST
                if closing:
                    self._uploader.upload_deferred()
            except Exception as error:
                # Whatever MLflow, its store or the network raises: the run matters more.
                self._warn(in_words(error))
                if closing:
                    return
                # Not all runs of a cluster at once, when their server is back.
                self._closing.wait(rest * random.uniform(0.75, 1.25))
                rest = min(_LONGEST_REST, 2 * rest)
                continue
            if closing:
                return
            self._grown.wait()
            # Many steps in one call: a call costs as much for one as for hundreds.
            self._closing.wait(_GATHER_SECONDS)

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "MLflow at %s: %s. Training goes on; what is to be logged is kept in %s",
                self._uploader.uri,
                why,
                self._journal,
            )
