"""NATS, as the mesh uses it. Nothing outside this package imports nats.

connection   Bus: connect and stay connected, publish, request, subscribe; limits checked before each write
service      micro services: $SRV.PING/INFO/STATS, typed requests, errors in headers
kv           leases and other small shared state: Bucket, LeaseTable
objects      models in the object store: push and pull with checksums
mapping      nats-py's errors to ours, once
"""

from mesh.bus.connection import Bus, BusOptions, Received, Subscription, end_tasks
from mesh.bus.kv import Bucket, LeaseTable
from mesh.bus.objects import ModelStore, kept_at
from mesh.bus.service import Endpoint, Service

__all__ = [
    "Bucket",
    "Bus",
    "BusOptions",
    "Endpoint",
    "LeaseTable",
    "ModelStore",
    "Received",
    "Service",
    "Subscription",
    "end_tasks",
    "kept_at",
]
