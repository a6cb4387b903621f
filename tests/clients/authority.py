"""A certificate authority of its own for a test: what it signs is trusted by nobody else.

Clients differ in what they accept: some refuse a certificate that is its own authority, so there are two certificates.
"""

from __future__ import annotations

import datetime
import ipaddress
import subprocess
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAYS = 2


def make(folder: Path) -> tuple[Path, Path, Path]:
    """(authority, chain, key) in PEM, for 127.0.0.1 and localhost. The authority's folder is a hashed CA path, too."""
    trusted = folder / "ca"
    trusted.mkdir()
    ca, chain, key = trusted / "ca.pem", folder / "chain.pem", folder / "key.pem"
    ca_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    authority = (
        _certificate(issuer, issuer, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    leaf = (
        _certificate(issuer, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), leaf_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    ca.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    chain.write_bytes(leaf.public_bytes(serialization.Encoding.PEM) + ca.read_bytes())
    pkcs8 = serialization.PrivateFormat.PKCS8
    key.write_bytes(leaf_key.private_bytes(serialization.Encoding.PEM, pkcs8, serialization.NoEncryption()))
    subprocess.run(["openssl", "rehash", str(trusted)], check=True, capture_output=True, timeout=30)
    return ca, chain, key


def _certificate(issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
