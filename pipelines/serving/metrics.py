"""What the gateway counts and times, in the form of Prometheus; no label holds anyone's words."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipelines.serving.stages import Handover

_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """One registry a gateway."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("omni_ray_requests", "HTTP requests", ["path", "status"], registry=own)
        self.sessions = Gauge("omni_ray_live_sessions", "Live conversations", registry=own)
        self.refused = Counter("omni_ray_sessions_refused", "Live conversations refused", ["reason"], registry=own)
        self.closed = Counter("omni_ray_sessions_closed", "Live conversations ended", ["code"], registry=own)
        self.responses = Counter("omni_ray_responses", "Responses of live conversations", ["status"], registry=own)
        self.rollbacks = Counter("omni_ray_rollbacks", "Answers thrown away because the user went on", registry=own)
        self.wasted = Counter("omni_ray_wasted_rows", "Generated rows of such answers", registry=own)
        self.first_out = Histogram(
            "omni_ray_turn_end_to_first_sound_seconds",
            "End of the user's turn to the first sound that leaves",
            buckets=_BUCKETS_S,
            registry=own,
        )
        self.handed_s = Histogram(
            "omni_ray_handover_seconds",
            "A session's rows from one language stage to the other",
            buckets=_BUCKETS_S,
            registry=own,
        )
        self.handed_bytes = Counter("omni_ray_handover_bytes", "Bytes of such rows", registry=own)
        self.errors = Counter("omni_ray_client_events_refused", "Client events answered with an error", registry=own)

    def handed(self, handover: Handover) -> None:
        """Count a handover."""
        self.handed_s.observe(handover.seconds)
        self.handed_bytes.inc(handover.bytes)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
