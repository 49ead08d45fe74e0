"""Mutual TLS for the tcp transport.

Both sides show a certificate and both check the other's against one CA, which must be the
cluster's own: whoever has a certificate from it is a peer. Names in certificates are not looked
at, since peers are reached by addresses that change. There is no way back to plain connections.
"""

from __future__ import annotations

import ssl

from baton.core.config import TlsConfig
from baton.core.errors import ConfigError

ADVICE = "handoff.tls must be set on both sides or on neither"


class TlsContexts:
    """The files of a :class:`TlsConfig`, read once.

    Raises ConfigError with the setting's name for a file that cannot be read or used.
    """

    def __init__(self, config: TlsConfig) -> None:
        ca, cert, key = config.ca, config.cert, config.key
        if ca is None or cert is None or key is None:
            raise ConfigError("handoff.tls needs ca, cert and key", param="handoff.tls")
        for name, path in (("ca", ca), ("cert", cert), ("key", key)):
            _check_readable(f"handoff.tls.{name}", path)
        self.server = _context(ssl.PROTOCOL_TLS_SERVER, ca, cert, key)
        # Readers do not resume sessions: a ticket would only be one more thing to send.
        self.server.num_tickets = 0
        self.client = _context(ssl.PROTOCOL_TLS_CLIENT, ca, cert, key)


def _check_readable(setting: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(
            f"{setting} is {path!r}, which cannot be read: {error.strerror}", param=setting
        ) from error


def _context(protocol: int, ca: str, cert: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=ca)
    except ssl.SSLError as error:
        raise ConfigError(
            f"handoff.tls.ca is {ca!r}, which holds no certificates in PEM form: {error.reason}",
            param="handoff.tls.ca",
        ) from error
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except ssl.SSLError as error:
        raise ConfigError(
            f"handoff.tls.cert {cert!r} and handoff.tls.key {key!r} are no certificate with its"
            f" key in PEM form: {error.reason or error}",
            param="handoff.tls.cert",
        ) from error
    return context


def _no_password() -> str:
    # Without this, an encrypted key would be asked for on the terminal.
    raise ConfigError(
        "handoff.tls.key is encrypted: give a key without a password", param="handoff.tls.key"
    )


def is_not_tls(error: ssl.SSLError) -> bool:
    """Whether the peer's first bytes were not those of a TLS handshake."""
    return error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_MESSAGE")


def explain(error: ssl.SSLError) -> str:
    """What went wrong between two peers, in words that lead somewhere."""
    reason = (error.reason or str(error)).lower().replace("_", " ")
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is refused: {error.verify_message}"
    if is_not_tls(error):
        return f"the peer does not speak TLS: {ADVICE}"
    if "alert" in reason:
        return f"the peer refuses this side's certificate: {reason}"
    return f"the TLS connection failed: {reason}"
