"""The spans of the mesh and their attributes: every name, its meaning, and where it comes from. docs/tracing.md is made from this file.

Where OpenTelemetry's conventions have a name it is used: `gen_ai.*` for generations, `messaging.*` for NATS, `http.*` for HTTP. What only
this mesh has is `mesh.*`. A span's name never holds a value that changes from request to request; a subject is named by its template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["ATTRIBUTES", "PHASES", "SPANS", "Attribute", "SpanType"]


@dataclass(frozen=True, slots=True)
class Attribute:
    name: str
    type: str
    meaning: str


@dataclass(frozen=True, slots=True)
class SpanType:
    """name: as it is in a trace; words in braces are attributes. within: the name of its parent."""

    name: str
    service: str
    within: str
    meaning: str


PHASES: Final = {
    "queue": "waiting: for a row, or for the shard's compute thread",
    "open": "asking the shards for rows",
    "network": "between two processes: NATS, the kernel, and the event loop of the receiver until it takes the message",
    "codec": "reading and writing a frame",
    "compute": "the stage's own work",
    "coordinator": "the coordinator between the answer to one step and the next step",
    "failover": "from the last token before a loss to the first step on the new route",
    "server": "inside nats-server, from the message's arrival to its last delivery",
}
"""The values of `mesh.phase`. A span with a phase is a leaf: its time belongs to this phase alone (`server` lies within `network`)."""

SPANS: Final = (
    SpanType("{http.request.method} {http.route}", "gateway", "", "an HTTP request"),
    SpanType("{gen_ai.operation.name} {gen_ai.request.model}", "coordinator", "the gateway's or the client's span", "one generation"),
    SpanType("prepare prompt", "coordinator", "the generation", "the chat template and the tokens of the prompt"),
    SpanType("queue", "coordinator", "the generation", "waiting until every layer range has a row"),
    SpanType("open rows", "coordinator", "the generation", "asking one shard of each range for a row, up to the last answer"),
    SpanType("open row", "coordinator", "open rows", "one shard's answer"),
    SpanType("prefill chunk", "coordinator", "the generation", "one part of the prompt, through every stage"),
    SpanType("decode step", "coordinator", "the generation", "one token, through every stage; linked to the other sessions of the step"),
    SpanType("decode steps", "coordinator", "the generation", "several steps in one span, where a trace would have too many"),
    SpanType("frame", "coordinator", "a step", "a frame on its way to the next process; `messaging.*` says where"),
    SpanType("nats-server", "nats-server", "frame", "the frame inside the server, from the server's own message trace"),
    SpanType("stage", "shard", "a step", "one shard's part of a step"),
    SpanType("read frame", "shard", "stage", "decoding and checking the frame"),
    SpanType("wait", "shard", "stage", "until the compute thread is free"),
    SpanType("compute", "shard", "stage", "the layers; on the last stage also the head, and the likeliest token of each row"),
    SpanType("sampling", "shard", "stage", "drawing tokens, where a row asks for more than the likeliest one, or awaiting masks"),
    SpanType("write frame", "shard", "stage", "encoding the result and handing it to the connection"),
    SpanType("turn", "coordinator", "the generation", "the coordinator between the answer to a step and the next step"),
    SpanType("detokenize", "coordinator", "the generation", "the token's text and stop texts"),
    SpanType("failover", "coordinator", "the generation", "the time without a route after a loss; `mesh.replay` says how it was mended"),
    SpanType("start shard", "shard", "", "a shard from its start until it is ready"),
    SpanType("fetch model", "shard", "start shard", "copying the model's files from the mesh, while those that are there are loaded"),
    SpanType("load model", "shard", "start shard", "reading the weights and building the stage"),
    SpanType("warm up", "shard", "start shard", "compiling programs, or loading compiled ones"),
)

ATTRIBUTES: Final = (
    Attribute("gen_ai.operation.name", "string", "`chat`, `text_completion` or `embeddings`"),
    Attribute("gen_ai.provider.name", "string", "always `mesh`"),
    Attribute("gen_ai.request.model", "string", "the model that was asked for"),
    Attribute("gen_ai.response.model", "string", "the model that answered"),
    Attribute("gen_ai.response.id", "string", "the public id of the generation"),
    Attribute("gen_ai.request.max_tokens", "int", "the most tokens that were asked for"),
    Attribute("gen_ai.request.temperature", "double", "0 is greedy"),
    Attribute("gen_ai.request.top_p", "double", "where it is not 1"),
    Attribute("gen_ai.request.top_k", "int", "where it is set"),
    Attribute("gen_ai.request.seed", "int", "where it is set"),
    Attribute("gen_ai.request.stream", "boolean", "whether the tokens were asked for one by one"),
    Attribute("gen_ai.usage.input_tokens", "int", "tokens of the prompt"),
    Attribute("gen_ai.usage.output_tokens", "int", "tokens generated"),
    Attribute("gen_ai.response.finish_reasons", "string[]", "`stop`, `length`, `cancelled` or `error`"),
    Attribute("gen_ai.response.time_to_first_chunk", "double", "seconds from the request's arrival to its first token"),
    Attribute("gen_ai.input.messages", "string", "the prompt, only with `tracing.content`"),
    Attribute("gen_ai.output.messages", "string", "the answer, only with `tracing.content`"),
    Attribute("messaging.system", "string", "always `nats`"),
    Attribute("messaging.operation.name", "string", "`publish` or `process`"),
    Attribute("messaging.operation.type", "string", "`send` or `process`"),
    Attribute("messaging.destination.template", "string", "the subject with the changing words in capitals"),
    Attribute("messaging.message.body.size", "int", "bytes of the message"),
    Attribute("http.request.method", "string", ""),
    Attribute("http.route", "string", "the path's template"),
    Attribute("http.response.status_code", "int", ""),
    Attribute("error.type", "string", "the code of the error, as in the answer"),
    Attribute("mesh.phase", "string", "what the time of a leaf belongs to (below)"),
    Attribute("mesh.shard", "string", "the shard"),
    Attribute("mesh.range", "string", "its layers, `0-10`: the last one is not in it"),
    Attribute("mesh.epoch", "int", "of the session's route: it counts the routes"),
    Attribute("mesh.rows", "int", "rows of the step"),
    Attribute("mesh.bucket", "int", "rows or tokens that were computed, padding included"),
    Attribute("mesh.tokens", "int", "tokens of the chunk, or of the steps"),
    Attribute("mesh.position", "int", "the position of the step's first token"),
    Attribute("mesh.bytes", "int", "bytes of the frame"),
    Attribute("mesh.steps", "int", "steps in this span"),
    Attribute("mesh.step", "int", "the number of the step, from 0"),
    Attribute("mesh.compute_s", "double", "seconds of computing in these steps"),
    Attribute("mesh.network_s", "double", "seconds on the way in these steps"),
    Attribute("mesh.wait_s", "double", "seconds of waiting for compute threads in these steps"),
    Attribute("mesh.codec_s", "double", "seconds of reading and writing frames in these steps"),
    Attribute("mesh.from", "string", "the process that sent the frame, or the shard before a failover"),
    Attribute("mesh.to", "string", "the process that gets it, or the shard after a failover"),
    Attribute(
        "mesh.replay",
        "string",
        "how a loss is mended: by a `mirror`, a `replay` (of which this chunk is a part), a `resend`",
    ),
    Attribute("mesh.restarts", "int", "routes that the generation lost"),
    Attribute("mesh.clock_offset_s", "double", "how far the shard's clock was ahead of the coordinator's; times are corrected by it"),
    Attribute("mesh.clock_error_s", "double", "the most by which this correction can be wrong"),
    Attribute("mesh.unfinished", "boolean", "the span still runs; its end is the moment at which it was looked at"),
    Attribute("mesh.estimated", "boolean", "the place of this span in its parent is computed, not measured"),
    Attribute("mesh.kept_because", "string", "why the trace was kept: `ratio`, `parent`, `error`, `failover`, `slow`"),
)
