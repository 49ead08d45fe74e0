"""Client library for applications and tools."""

from baton.client.admin import AdminClient
from baton.client.aio import AsyncBatonClient
from baton.client.inference import BatonClient
from baton.client.messages import GenerateChunk, generate_request

__all__ = ["AdminClient", "AsyncBatonClient", "BatonClient", "GenerateChunk", "generate_request"]
