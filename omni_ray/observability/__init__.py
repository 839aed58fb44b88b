"""What a run tells: events with fields, spans, a progress line, and metrics per step.

``from omni_ray.observability import emit, span, Progress, MetricsWriter``
"""

from omni_ray.observability.events import EventLog, emit, event_log_to, read_events
from omni_ray.observability.metrics import MetricsWriter
from omni_ray.observability.progress import Progress, format_duration
from omni_ray.observability.spans import Span, SpanRecorder, process_recorder, span, write_chrome_trace

__all__ = [
    "EventLog",
    "MetricsWriter",
    "Progress",
    "Span",
    "SpanRecorder",
    "emit",
    "event_log_to",
    "format_duration",
    "process_recorder",
    "read_events",
    "span",
    "write_chrome_trace",
]
