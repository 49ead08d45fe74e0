"""Runs a function on every rank of a mesh, each in a process of its own, over gloo."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from baton.engine.parallel.comm import close_mesh, host_store, make_mesh
from baton.engine.parallel.mesh import Axes, Mesh

TIMEOUT_S = 60.0
CPU = torch.device("cpu")

# A server that has torch forks the ranks: importing it in each takes seconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "baton.engine.parallel.exchange"])


def on_ranks(
    axes: Axes,
    work: Callable[..., Any],
    *args: Any,
    timeout_s: float = TIMEOUT_S,
    may_end: tuple[int, ...] = (),
) -> list[Any]:
    """What ``work(mesh, *args)`` returns, by rank; None for those that ``may_end`` and do.

    ``work`` is a function of a module, and its result plain values. Raises AssertionError with
    what a rank raised.
    """
    hosted = host_store(TIMEOUT_S)
    results: list[Any] = []
    with contextlib.ExitStack() as stack:
        pipes = []
        for rank in range(axes.world_size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank, args=(theirs, axes, rank, hosted.address, timeout_s, work, args)
            )
            process.start()
            stack.callback(process.join, TIMEOUT_S)
            stack.callback(process.kill)
            theirs.close()
            pipes.append(ours)
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(TIMEOUT_S), f"rank {rank} does not answer"
            try:
                error, result = pipe.recv()
            except EOFError:
                assert rank in may_end, f"rank {rank} ended"
                error, result = None, None
            assert error is None, f"rank {rank}: {error}"
            results.append(result)
    return results


def _rank(
    pipe: Connection,
    axes: Axes,
    rank: int,
    address: str,
    timeout_s: float,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    mesh: Mesh | None = None
    answer: tuple[str | None, Any]
    try:
        mesh = make_mesh(axes, rank, store=address, timeout_s=timeout_s, device=CPU)
        with torch.inference_mode():
            answer = (None, work(mesh, *args))
    except Exception as error:
        answer = (f"{type(error).__name__}: {error}", None)
    pipe.send(answer)
    if mesh is not None and answer[0] is None:
        # Not before all have: who leaves first would be a lost peer for the others.
        with contextlib.suppress(Exception):
            mesh.ep.all_reduce(torch.zeros(1))
            mesh.dp.all_reduce(torch.zeros(1))
            mesh.tp.all_reduce(torch.zeros(1))
    close_mesh()


@contextlib.contextmanager
def watched(pids: tuple[int, ...]) -> Iterator[Callable[[float], set[int]]]:
    """Yields ``left(timeout_s)``: which of the processes still run after so long at most."""
    fds = {os.pidfd_open(pid): pid for pid in pids}

    def left(timeout_s: float) -> set[int]:
        running = dict(fds)
        poll = select.poll()
        for fd in running:
            poll.register(fd, select.POLLIN)
        while running:
            ready = poll.poll(timeout_s * 1000)
            if not ready:
                break
            for fd, _ in ready:
                poll.unregister(fd)
                del running[fd]
        return set(running.values())

    try:
        yield left
    finally:
        for fd in fds:
            os.close(fd)
