"""The global scheduler: pure core, asyncio shell, Ray actor."""
