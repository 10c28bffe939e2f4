"""Throw-away certificates for tests, made by the `openssl` command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """An authority, and one certificate of 127.0.0.1 that it signed, for servers and clients."""

    ca: Path
    cert: Path
    key: Path
    both: Path
    """Key and certificate in one file."""


def make_certificates(folder: Path) -> Certificates:
    """Make an authority of its own in `folder`."""
    folder.mkdir(parents=True)
    made = Certificates(
        ca=folder / "ca.pem", cert=folder / "cert.pem", key=folder / "key.pem", both=folder / "both.pem"
    )
    extensions = folder / "extensions"
    extensions.write_text("subjectAltName=IP:127.0.0.1\n")
    new = ("openssl", "req", "-newkey", "rsa:2048", "-nodes")
    ca_key, request = folder / "ca.key", folder / "request.pem"
    for words in (
        (*new, "-x509", "-days", "2", "-subj", f"/CN={folder.name}", "-keyout", ca_key, "-out", made.ca),
        (*new, "-subj", "/CN=127.0.0.1", "-keyout", made.key, "-out", request),
        (
            *("openssl", "x509", "-req", "-days", "2", "-in", request, "-CA", made.ca, "-CAkey", ca_key),
            *("-CAcreateserial", "-extfile", extensions, "-out", made.cert),
        ),
    ):
        subprocess.run([str(word) for word in words], check=True, capture_output=True)
    made.both.write_text(made.key.read_text() + made.cert.read_text())
    return made
