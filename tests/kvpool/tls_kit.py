"""Certificates for tests, made with the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path

from baton.core.config import TlsConfig

_SETTINGS = """
[ca]
default_ca = here
[here]
database = index.txt
new_certs_dir = .
rand_serial = yes
unique_subject = no
default_md = sha256
default_days = 2
policy = names
[names]
commonName = supplied
"""
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
_PAST = ("-startdate", "20200101000000Z", "-enddate", "20200102000000Z")


class Authority:
    """Signs certificates; its files lie in ``folder``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        (folder / "settings").write_text(_SETTINGS)
        (folder / "index.txt").touch()
        self._openssl(
            *(
                "req",
                "-x509",
                *_NEW_KEY,
                "-nodes",
                "-days",
                "2",
                "-subj",
                f"/CN=authority of {folder.name}",
            ),
            *("-keyout", "ca.key", "-out", "ca"),
        )

    def issue(self, name: str, *, expired: bool = False) -> TlsConfig:
        """A new certificate, with what its owner needs."""
        self._openssl(
            *("req", "-new", *_NEW_KEY, "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.request"),
        )
        self._openssl(
            *("ca", "-batch", "-notext", "-config", "settings", "-cert", "ca"),
            *("-keyfile", "ca.key", *(_PAST if expired else ())),
            *("-in", f"{name}.request", "-out", name),
        )
        ca, cert, key = (str(self._folder / file) for file in ("ca", name, f"{name}.key"))
        return TlsConfig(ca=ca, cert=cert, key=key)

    def encrypt(self, key: str, to: Path) -> None:
        """A key with a password."""
        self._openssl("pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", str(to))

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments], cwd=self._folder, check=True, capture_output=True, timeout=30
        )
