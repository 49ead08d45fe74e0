"""A network in between that does what a test wants."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable

Filter = Callable[[int, bytes], bytes | None]
"""(offset in the exporter's bytes, a piece) -> what passes; None: the connection is reset."""


class MiddleMan:
    """Passes one connection after another on to a server, through a filter."""

    def __init__(self, address: str, pass_on: Filter, *, piece_bytes: int = 65536) -> None:
        """``piece_bytes``: the most that the filter is given at once."""
        self.serve(address)
        self._filter = pass_on
        self._piece_bytes = piece_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def serve(self, address: str) -> None:
        """Pass the connections to come on to this server."""
        host, _, port = address.rpartition(":")
        self._server = (host, int(port))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._open += [client, server]
                for run in (self._up, self._down):
                    thread = threading.Thread(target=run, args=(client, server), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        offset = 0
        with contextlib.suppress(OSError):
            while data := server.recv(self._piece_bytes):
                passed = self._filter(offset, data)
                offset += len(data)
                if passed is None:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    # The other thread's recv holds the socket; without it, close resets.
                    client.shutdown(socket.SHUT_RD)
                    client.close()
                    return
                client.sendall(passed)
                if len(passed) < len(data):
                    break
            client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in (self._listener, *self._open):
            sock.close()
