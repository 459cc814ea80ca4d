"""The Python client of a mesh.

    from mesh.client import MeshClient

    with MeshClient("nats://127.0.0.1:4222") as mesh:
        print(mesh.generate("What is rain?", max_tokens=50).text)
        for chunk in mesh.stream("Tell me a story."):
            print(chunk.text, end="", flush=True)

AsyncMeshClient is the same for asyncio. Both speak to coordinators over NATS and need neither a model nor JAX.

aio          AsyncMeshClient
sync         MeshClient
embedding    vectors of several texts
request      the arguments of a request, for type checkers
stream       one generation request: sending it, repeating it, ordering its answers
parsing      answers as instances of pydantic models
results      what both clients return
shapes       what makes the documents of an API from generations; openai_shapes makes OpenAI's
read_model   the picture of a mesh for the dashboard, `mesh top` and `mesh status`
"""

from mesh.client.aio import AsyncMeshClient
from mesh.client.request import ChatArguments, EmbedArguments, GenerateArguments, RequestArguments
from mesh.client.results import (
    BatchResult,
    Chunk,
    Completion,
    CoordinatorStatus,
    Embeddings,
    Health,
    MeshStatus,
    MeshUsage,
    Timing,
    Token,
    Usage,
)
from mesh.client.stream import Stream
from mesh.client.sync import MeshClient, SyncStream
from mesh.protocol.batches import BatchStatus
from mesh.protocol.stream import Waiting

__all__ = [
    "AsyncMeshClient",
    "BatchResult",
    "BatchStatus",
    "ChatArguments",
    "Chunk",
    "Completion",
    "CoordinatorStatus",
    "EmbedArguments",
    "Embeddings",
    "GenerateArguments",
    "Health",
    "MeshClient",
    "MeshStatus",
    "MeshUsage",
    "RequestArguments",
    "Stream",
    "SyncStream",
    "Timing",
    "Token",
    "Usage",
    "Waiting",
]
