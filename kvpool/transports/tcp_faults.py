"""What a failed connection to an exporter means, and what it is counted by."""

from __future__ import annotations

import ssl

from kvpool.transport import TransferFault
from kvpool.transports.tcp_channel import ConnectionEnded


def ends_connection(error: OSError) -> bool:
    """Whether the connection ended, rather than that what came over it made no sense."""
    return not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLEOFError)


def fault_of(error: OSError, *, begun: bool) -> TransferFault:
    """``begun``: the peer had agreed to answer."""
    if not ends_connection(error):
        reason = getattr(error, "reason", None) or ""
        # Certificates that a peer refuses are told after the handshake.
        refused = "ALERT" in reason and "RECORD_MAC" not in reason
        return TransferFault.OTHER if refused else TransferFault.CORRUPT
    short = isinstance(error, ConnectionEnded) and (begun or error.received > 0)
    return TransferFault.SHORT if short else TransferFault.GONE
