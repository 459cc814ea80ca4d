"""NATS, as the mesh uses it. Nothing outside this package imports nats.

options      BusOptions: where NATS is, and as whom to go there
connection   Bus: connect and stay connected, publish, request, subscribe; limits checked before each write
transport    the socket under nats-py, with a short way for the token path
service      micro services: $SRV.PING/INFO/STATS, typed requests, errors in headers
kv           leases and other small shared state: Bucket, LeaseTable
events       what happened, and the stream that keeps it
batches      durable batches: the queue, the results
replicas     on how many servers of a cluster all this is kept
objects      models in the object store: push and pull with checksums
mapping      nats-py's errors to ours, once
"""

from mesh.bus.connection import Bus, Received, Subscription, end_tasks
from mesh.bus.events import EventLog, announce, keep_events
from mesh.bus.kv import Bucket, LeaseTable
from mesh.bus.objects import ModelStore, kept_at
from mesh.bus.options import BusOptions
from mesh.bus.service import Endpoint, Service

__all__ = [
    "Bucket",
    "Bus",
    "BusOptions",
    "Endpoint",
    "EventLog",
    "LeaseTable",
    "ModelStore",
    "Received",
    "Service",
    "Subscription",
    "announce",
    "end_tasks",
    "keep_events",
    "kept_at",
]
