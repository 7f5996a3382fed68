"""Certificates for tests, made with OpenSSL's own command."""

from __future__ import annotations

import subprocess
from pathlib import Path


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_ca(folder: Path, name: str = "ca") -> Path:
    """A CA; returns the file of its certificate, beside which its key is."""
    certificate = folder / f"{name}.pem"
    _openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-subj", f"/CN={name}", "-keyout", certificate.with_suffix(".key"), "-out", certificate)  # fmt: skip
    return certificate


def sign(ca: Path, folder: Path, name: str, common_name: str = "localhost") -> tuple[Path, Path]:
    """A certificate and its key, of one signed by a CA."""
    certificate, key, request, extra = (folder / f"{name}.{kind}" for kind in ("pem", "key", "csr", "ext"))
    extra.write_text(f"subjectAltName=DNS:{common_name}\n")
    _openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
             f"/CN={common_name}", "-keyout", key, "-out", request)  # fmt: skip
    _openssl("x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca.with_suffix(".key"), "-CAcreateserial",
             "-days", "2", "-extfile", extra, "-out", certificate)  # fmt: skip
    return certificate, key
