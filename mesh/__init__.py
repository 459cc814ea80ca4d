"""Serve a language model that fits no single machine: layer shards in JAX, joined by NATS.

From the top down; a package imports only those below it (docs/architecture.md, tests/unit/test_imports.py).

    entry, cli, commands   the command line
    doctor          the checks of `mesh doctor`
    gateway         HTTP, and the dashboard
    local           a whole mesh on one machine
    coordinator     requests, sessions, routes, failover
    shard           one layer range served over NATS
    importer        a source turned into a model directory, verified
    client          the Python client
    runtime         a stage: programs, caches, sampling
    bus             NATS; nothing else imports it
    planner         which layers on which machine
    lowering        ONNX graphs to JAX functions
    kernels         products and attention in C++, where they are compiled
    model           manifest, tokenizer, memory prediction
    pki             certificates, users of NATS and configurations of its servers
    telemetry       logs, traces, metrics
    protocol        subjects, messages, frames
    http            the HTTP listener and its tokens
    host            the machine: processes, signals, folders
    settings        configuration
    dtypes          the names of element types
    types, errors   shared by all
"""

from __future__ import annotations

__version__ = "0.1.0"
"""The only place that says the version: pyproject.toml reads it from here."""
