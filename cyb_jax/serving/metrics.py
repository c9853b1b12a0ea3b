"""The server's metrics in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cyb_jax.serving.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
  """The metrics of one server, in a registry of its own.

  Args:
    engine: the engine.
  """

  def __init__(self, engine: Engine):
    self._registry = CollectorRegistry()
    self._registry.register(_EngineCollector(engine))
    self._requests = Counter(
      "cyb_http_requests", "Answered requests by route and status.", ("route", "status"), registry=self._registry
    )
    self._first = Histogram(
      "cyb_time_to_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, registry=self._registry
    )
    self._whole = Histogram(
      "cyb_request_seconds", "From a request to its last token.", buckets=_SECONDS, registry=self._registry
    )

  def count(self, route: str, status: int) -> None:
    """Counts an answered request."""
    self._requests.labels(route, str(status)).inc()

  def first_token(self, seconds: float) -> None:
    """Records the time to the first token of a request."""
    self._first.observe(seconds)

  def last_token(self, seconds: float) -> None:
    """Records the time to the last token of a request."""
    self._whole.observe(seconds)

  def text(self) -> bytes:
    """All metrics."""
    return generate_latest(self._registry)


class _EngineCollector(Collector):
  """Reads the engine's sums when the metrics are requested."""

  def __init__(self, engine: Engine):
    self._engine = engine

  def collect(self) -> Iterator[Metric]:
    stats, engine = self._engine.stats, self._engine
    yield GaugeMetricFamily("cyb_rows_running", "Rows that generate text.", engine.num_running)
    yield GaugeMetricFamily("cyb_rows_waiting", "Rows that wait for a free row.", engine.num_waiting)
    yield CounterMetricFamily("cyb_prompt_tokens", "Tokens of prompts.", stats.prompt_tokens)
    yield CounterMetricFamily("cyb_generated_tokens", "Generated tokens.", stats.tokens)
    yield CounterMetricFamily("cyb_pauses", "Pauses before generated tokens.", stats.pauses)
    yield CounterMetricFamily("cyb_chunks", "Chunks of iterations of a batch.", stats.chunks)
    rows = CounterMetricFamily("cyb_rows", "Rows by their end.", labels=("end",))
    for name in ("finished", "cancelled", "failed"):
      rows.add_metric((name,), getattr(stats, name))
    yield rows
