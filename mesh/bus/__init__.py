"""NATS, as the mesh uses it. Nothing outside this package imports nats.

options      BusOptions: where NATS is, and which user connects
connection   Bus: connect and stay connected, publish, request, subscribe; limits are checked before each write
transport    the socket under nats-py, with a short path for frames
websocket    the same socket inside a WebSocket, for ws:// and wss:// servers
service      micro services: $SRV.PING/INFO/STATS, typed requests, errors in headers
kv           leases and other small shared state: Bucket, LeaseTable
events       announcements of what happened, and the stream that keeps them
batches      durable batches: the queue and the results
dead         messages of a queue that no process can handle
replicas     how many servers of a cluster keep a stream
storage      what JetStream says of its storage
metrics      what a connection reports of itself
spans        spans on their way to the coordinators, dropped rather than waited for
losses       whether a stream is still the one that was there before
objects      models in the object store: push and pull with checksums
pulling      the files of a model on their way into a directory
part_file    one of these files while it grows
chunks       one object, at the speed of the network
pace         how fast bytes may come, and when the rest will be there
backup       JetStream's streams in a folder, and back
jetstream    a request of JetStream's API
inspect      what a server says of itself, and what it permits
mapping      from nats-py's errors to ours
"""

from mesh.bus.connection import Bus, Received, Subscription, end_tasks
from mesh.bus.events import EventLog, announce, keep_events
from mesh.bus.kv import Bucket, LeaseTable
from mesh.bus.objects import ModelStore, files_of, kept_at
from mesh.bus.options import BusOptions
from mesh.bus.pulling import Pull
from mesh.bus.service import Endpoint, Service

__all__ = [
    "Bucket",
    "Bus",
    "BusOptions",
    "Endpoint",
    "EventLog",
    "LeaseTable",
    "ModelStore",
    "Pull",
    "Received",
    "Service",
    "Subscription",
    "announce",
    "end_tasks",
    "files_of",
    "keep_events",
    "kept_at",
]
