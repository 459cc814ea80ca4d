"""A mesh of language-model layer shards in JAX over NATS.

A package imports only packages below it in this list (tests/unit/test_imports.py):

cli          the command line
commands     one file a command
gateway      HTTP for clients: the mesh's own API and OpenAI's
local        a whole mesh on one machine
importer     from ONNX, safetensors or GGUF to a model directory
shard        one layer range, served over NATS
coordinator  takes requests, plans decode and prefill steps, recovers from failures
client       the Python SDK
runtime      compiled programs of one layer range, KV cache, sampling
lowering     from ONNX graphs to JAX functions
planner      where the layers of a model go
bus          the only user of NATS
model        the model directory: manifest, tokenizer, memory
http         the HTTP listener and its tokens
protocol     subjects, messages and frames on NATS
host         the process and the machine it runs on
settings     configuration files
telemetry    logs
types        names that every package shares
errors       the tree of errors
"""

from __future__ import annotations

__version__ = "0.1.0"
"""The only place that says the version: pyproject.toml reads it from here."""
