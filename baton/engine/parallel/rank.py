"""A rank's life: connect to the driver, join the others, load a shard, compute what is asked.

A rank ends when the driver's socket closes, whatever became of the driver: a thread watches it,
because the rank's own may be deep in a collective. After an error the rank tells the driver and
computes nothing more: its peers may be at another collective than it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import os
import pickle
import select
import signal
import sys
import threading

import torch

from baton.core.errors import BatonError, InstanceLost
from baton.engine.checkpoint import open_checkpoint
from baton.engine.ops.devices import find_device
from baton.engine.parallel.comm import HostedStore, close_mesh, host_store, make_mesh
from baton.engine.parallel.mesh import Mesh
from baton.engine.parallel.spec import RankSpec
from baton.engine.parallel.wire import (
    Failure,
    Kind,
    Link,
    connect,
    decode_step,
    encode_failure,
    encode_result,
    encode_values,
)
from baton.engine.runner import InlineRunner
from kvpool.arena import BlockArena

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 30.0
_LEAVE_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1


def run_rank(spec: RankSpec) -> None:
    """Live as one rank until the driver says so, or is gone; then the whole process ends.

    Returns after an orderly end. Raises only where the driver cannot be reached: later errors go
    to the driver.
    """
    link = connect(spec.socket_path, spec.rank, spec.secret, _CONNECT_TIMEOUT_S)
    end = _End()
    watch = threading.Thread(target=end.watch, args=(link,), name="driver-watch", daemon=True)
    watch.start()
    with contextlib.ExitStack() as stack:
        try:
            _serve(spec, link, stack)
            end.is_near.set()
        except (EOFError, OSError):
            # The watching thread sees the same.
            watch.join(_LEAVE_TIMEOUT_S)
            os._exit(1)
        except Exception as error:
            logger.exception("%s cannot go on", spec.name)
            # Before anything is torn down: the peers must not be the first to complain.
            with contextlib.suppress(OSError):
                link.send(Kind.FAILED, encode_failure(_failure(error)))
                # The driver ends all ranks now.
                watch.join(_LEAVE_TIMEOUT_S)
            os._exit(1)
    end.is_here.set()
    link.close()


class _End:
    """Ends this process when the driver is gone."""

    def __init__(self) -> None:
        self.is_near = threading.Event()
        """The driver asked for it."""
        self.is_here = threading.Event()

    def watch(self, link: Link) -> None:
        """Wait for the other end of ``link`` to close. The process goes, unless it has ended."""
        poll = select.poll()
        # Not for its data, which is the other thread's.
        poll.register(link.fileno(), select.POLLRDHUP)
        poll.poll()
        if self.is_near.is_set():
            self.is_here.wait(_LEAVE_TIMEOUT_S)
        if not self.is_here.is_set():
            os._exit(1)


def _serve(spec: RankSpec, link: Link, stack: contextlib.ExitStack) -> None:
    hosted: HostedStore | None = None
    if spec.rank == 0:
        hosted = host_store(spec.collective_timeout_s)
        link.send(Kind.DONE, hosted.address.encode())
    kind, body = link.receive(wait=True)
    assert kind is Kind.JOIN, kind
    device = find_device(spec.engine.device)
    if device.type != "cpu":
        torch.accelerator.set_device_index(spec.rank % torch.accelerator.device_count())
    mesh = make_mesh(
        spec.axes,
        spec.rank,
        store=hosted.store if hosted is not None else body.decode(),
        timeout_s=spec.collective_timeout_s,
        device=device,
    )
    stack.callback(close_mesh)
    runner = _load(spec, mesh, stack)
    link.send(Kind.DONE)
    reports = mesh.group_rank == 0
    while True:
        kind, body = link.receive(wait=True)
        if kind is Kind.STEP:
            result = runner.step(*decode_step(body))
            link.send(Kind.DONE, encode_result(result) if reports else b"")
        elif kind is Kind.WARM_UP:
            runner.warm_up()
            link.send(Kind.DONE)
        elif kind is Kind.PROFILE:
            link.send(Kind.DONE, encode_values(runner.profile()))
        elif kind is Kind.MEMORY:
            maps = [dataclasses.replace(item, rank=spec.name) for item in runner.memory()]
            link.send(Kind.DONE, encode_values(maps))
        else:
            assert kind is Kind.EXIT, kind
            return


def _load(spec: RankSpec, mesh: Mesh, stack: contextlib.ExitStack) -> InlineRunner:
    buffer = None
    if spec.arena is not None:
        arena = BlockArena.open(spec.arena.path, spec.arena.token, writable=True)
        stack.callback(arena.close)
        buffer = arena.run(spec.arena.first_block, spec.engine.kv_blocks)
    runner = InlineRunner(open_checkpoint(spec.model), spec.engine, mesh=mesh, kv_buffer=buffer)
    stack.callback(runner.close)
    return runner


def _failure(error: Exception) -> Failure:
    lost_peer = isinstance(error, InstanceLost)
    if isinstance(error, BatonError):
        return Failure(error.message, error.code, error.param, lost_peer)
    return Failure(f"{type(error).__name__}: {error}")


def main() -> None:
    """A rank as a child process: who its parent is and a ``RankSpec`` come through stdin."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    parent, spec = pickle.load(sys.stdin.buffer)
    assert isinstance(spec, RankSpec)
    _die_with(parent)
    # Ctrl-C reaches the whole terminal; what it means is the driver's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_rank(spec)
    logging.shutdown()
    # All is released: the interpreter would take seconds to unload torch.
    os._exit(0)


def _die_with(parent: int) -> None:
    """Have the kernel end this process with its parent, should it be stuck in native code then."""
    # Without it (not Linux) the closed socket is what ends it.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
