"""What the service counts, as Prometheus reads it."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Gauges = Callable[[], dict[str, dict[str, float]]]
"""name → label → value; the label is "" for a gauge without."""

_GAUGES = {
    "ttt_sessions": ("where", "Named sessions, by where they are."),
    "ttt_session_bytes": ("where", "Bytes of named sessions, by where they are."),
    "ttt_reserved_bytes": ("", "Bytes that requests being answered may take."),
    "ttt_requests_waiting": ("", "Requests that wait."),
    "ttt_requests_active": ("", "Requests being answered."),
}


class Metrics:
    """Counters of one service; every method may be called from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter(
            "ttt_requests", "Requests for text, by HTTP status.", ["status"]
        )
        self.tokens_read = self._counter("ttt_tokens_read", "Tokens of prompts read.")
        self.tokens_written = self._counter("ttt_tokens_written", "Tokens generated.")
        self.moved = self._counter("ttt_session_moves", "Sessions moved to or from disk.", ["kind"])
        self.cancelled = self._counter("ttt_requests_cancelled", "Requests nobody waited for.")
        self.failures = self._counter("ttt_model_failures", "Requests the model failed on.")
        self.batch = Histogram(
            "ttt_batch_size", "Rows that write together.", buckets=_ROWS, registry=self._registry
        )
        self.token_seconds = self._seconds("ttt_token_seconds", "A step of the rows that write.")
        self.piece_seconds = self._seconds("ttt_piece_seconds", "Reading a piece of prompts.")
        self.first_token = self._seconds(
            "ttt_first_token_seconds", "From a request's arrival to its first token."
        )
        self.request_seconds = self._seconds(
            "ttt_request_seconds", "From a request's arrival to the end of its answer."
        )

    def watch(self, gauges: Gauges) -> None:
        """Ask `gauges` for the present values whenever somebody reads."""
        self._registry.register(_Present(gauges))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, text, list(labels), registry=self._registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self._registry)


class _Present(Collector):
    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for name, values in self._gauges().items():
            label, text = _GAUGES[name]
            family = GaugeMetricFamily(name, text, labels=[label] if label else [])
            for key, value in values.items():
                family.add_metric([key] if label else [], value)
            yield family

    def describe(self) -> Iterable[Metric]:
        return []
