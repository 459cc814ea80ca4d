"""How long generations took, for the metrics: observed once, when a generation ends."""

from __future__ import annotations

from typing import Final

from mesh.coordinator.core.events import Ended
from mesh.coordinator.replies import Job
from mesh.errors import MeshError
from mesh.telemetry.registry import Histogram

__all__ = ["GenerationMeter"]

_PROVIDER: Final = "mesh"


class GenerationMeter:
    """The histograms of OpenTelemetry's conventions for servers of generations, of one model."""

    def __init__(self, model: str) -> None:
        self.first_token = Histogram("gen_ai_server_time_to_first_token_seconds")
        self.per_token = Histogram("gen_ai_server_time_per_output_token_seconds")
        self.duration = Histogram("gen_ai_server_request_duration_seconds")
        self.queue = Histogram("mesh_coordinator_queue_wait_seconds")
        self._model = model

    def ended(self, ended: Ended, job: Job | None) -> None:
        """A generation has ended. One that another coordinator began has had its first token there."""
        labels = self._labels(job)
        resumed = job is not None and job.request.resumed
        first_s = ended.first_token_s
        if first_s is not None and not resumed:
            self.first_token.observe(first_s, *labels)
        if first_s is not None and ended.tokens > 1:
            here = ended.tokens - (0 if job is None else len(job.request.prefix))
            if here > 1:
                self.per_token.observe((ended.total_s - first_s) / (here - 1), *labels)
        self.duration.observe(ended.total_s, *labels, "" if ended.error is None else ended.error.code)
        self.queue.observe(ended.queue_s)

    def rejected(self, error: MeshError, job: Job | None) -> None:
        """A request was refused before it began."""
        self.duration.observe(0.0, *self._labels(job), error.code)

    def _labels(self, job: Job | None) -> tuple[str, str, str]:
        return "text_completion" if job is None else job.message.operation, _PROVIDER, self._model
