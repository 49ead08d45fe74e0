"""What goes over a machine's link: the TCP streams, by the bytes that they begin with."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator

TLS_HANDSHAKE = b"\x16\x03"
"""A TLS record of type handshake, of any version."""

_ALL_PROTOCOLS = 0x0003
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 64 << 20
_SEEN_BYTES = 160
"""Of each frame: headers at their longest, and a start of what it carries."""
_IPV4, _TCP = 0x0800, 6
_SYN, _ACK = 0x02, 0x10

_Ends = tuple[bytes, int, bytes, int]
"""Address and port of the side that opened the stream, then of the other."""


@dataclasses.dataclass(slots=True)
class Stream:
    """One TCP connection that was opened while somebody looked."""

    start: bytes = b""
    """What the side that opened it sent first."""
    num_bytes: int = 0
    """Payload in both directions, retransmissions included."""


class Wire:
    """Looks at a network interface of this host. Needs root."""

    def __init__(self, interface: str) -> None:
        self._interface = interface
        self._open: dict[_Ends, Stream] = {}
        self._streams: list[Stream] = []
        self._lock = threading.Lock()
        self._num_lost = 0

    def num_bytes(self, start: bytes) -> int:
        """Payload of the streams that began with ``start``. Fails if frames were lost."""
        with self._lock:
            assert not self._num_lost, f"{self._num_lost} frames were not looked at"
            return sum(s.num_bytes for s in self._streams if s.start.startswith(start))

    @contextlib.contextmanager
    def looking(self) -> Iterator[Wire]:
        """Look during the block, on a thread."""
        kind = socket.SOCK_RAW
        with socket.socket(socket.AF_PACKET, kind, socket.htons(_ALL_PROTOCOLS)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
            sock.bind((self._interface, _ALL_PROTOCOLS))
            sock.setblocking(False)
            stop = os.eventfd(0)
            thread = threading.Thread(target=self._look, args=(sock, stop), name="wire")
            thread.start()
            try:
                yield self
            finally:
                os.eventfd_write(stop, 1)
                thread.join(10.0)
                os.close(stop)

    def _look(self, sock: socket.socket, stop: int) -> None:
        frame = bytearray(_SEEN_BYTES)
        while True:
            ready, _, _ = select.select([sock.fileno(), stop], [], [])
            if stop in ready:
                return
            # Its whole length, however little fits.
            length = sock.recv_into(frame, _SEEN_BYTES, socket.MSG_TRUNC)
            lost = struct.unpack("II", sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
            with self._lock:
                self._num_lost += lost
                self._take(bytes(frame[:length]), length)

    def _take(self, frame: bytes, length: int) -> None:
        if len(frame) < 54 or struct.unpack_from("!H", frame, 12)[0] != _IPV4:
            return
        tcp = 14 + 4 * (frame[14] & 0xF)
        if frame[23] != _TCP or len(frame) < tcp + 20:
            return
        source, target = frame[26:30], frame[30:34]
        from_port, to_port = struct.unpack_from("!HH", frame, tcp)
        # Short frames are padded; the packet says how long it is, but where it is longer than
        # that number can be.
        length = 14 + (struct.unpack_from("!H", frame, 16)[0] or length - 14)
        data = tcp + 4 * (frame[tcp + 12] >> 4)
        ends = (source, from_port, target, to_port)
        if frame[tcp + 13] & (_SYN | _ACK) == _SYN:
            self._open[ends] = Stream()
            self._streams.append(self._open[ends])
        elif length > data and (stream := self._open.get(ends)) is not None:
            stream.start = stream.start or frame[data : data + 16]
            stream.num_bytes += length - data
        elif length > data and (stream := self._open.get(_turned(ends))) is not None:
            stream.num_bytes += length - data


def _turned(ends: _Ends) -> _Ends:
    return ends[2], ends[3], ends[0], ends[1]
