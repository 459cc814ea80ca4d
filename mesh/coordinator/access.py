"""One line in the log for each request that has ended: what it was, how long it took, and how it ended.

The line has the request's public id and its trace, as the lines of the gateway and of the shards have. The texts of the prompt and of the
answer are logged only where `logging.content` is true.
"""

from __future__ import annotations

import logging

from mesh.coordinator.core.events import Ended, Rejected
from mesh.coordinator.replies import Job
from mesh.telemetry.log_context import log_context
from mesh.telemetry.logs import CONTENT

__all__ = ["log_ended", "log_rejected"]

log = logging.getLogger("mesh.coordinator.access")


def log_ended(job: Job, ended: Ended) -> None:
    """Log the end of a request that was admitted."""
    with log_context(request=job.id, trace=job.context.trace):
        if log.isEnabledFor(logging.INFO):
            fields = {
                "reason": ended.reason,
                "prompt_tokens": len(job.request.prompt),
                "tokens": ended.tokens,
                "seconds": round(ended.total_s, 6),
                "queue_s": round(ended.queue_s, 6),
                "first_token_s": None if ended.first_token_s is None else round(ended.first_token_s, 6),
                "restarts": ended.restarts,
                "code": None if ended.error is None else ended.error.code,
            }
            text = "%(reason)s after %(tokens)d tokens and %(seconds).3f s, %(prompt_tokens)d in the prompt, %(restarts)d restarts"
            log.info(text, fields, extra={"fields": fields})
        if CONTENT.isEnabledFor(logging.INFO):
            CONTENT.info("prompt and answer", extra={"fields": {"prompt": _prompt(job), "answer": "".join(job.pieces)}})


def log_rejected(job: Job, rejected: Rejected) -> None:
    """Log a request that was refused."""
    with log_context(request=job.id, trace=job.context.trace):
        fields = {"reason": "rejected", "prompt_tokens": len(job.request.prompt), "code": rejected.error.code}
        log.info("rejected (%(code)s), %(prompt_tokens)d tokens in the prompt", fields, extra={"fields": fields})


def _prompt(job: Job) -> str | list[dict[str, str]] | list[int]:
    message = job.message
    if message.messages is not None:
        return [part.model_dump() for part in message.messages]
    return list(message.tokens or ()) if message.prompt is None else message.prompt
