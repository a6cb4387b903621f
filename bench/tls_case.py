"""The figure of TLS: large PUTs to a node with a certificate, beside a bare receiver with the same one."""

from __future__ import annotations

import secrets
import subprocess
import tempfile
from pathlib import Path

from bench import bare, load
from bench.figure import MIB, Bench, Figure, Rounds
from bench.load import Plan
from bench.node import started
from bench.wire import Endpoint

LARGE_BYTES = 64 * MIB
ROUND_OBJECTS = 5


def put_tls(bench: Bench) -> Figure:
    rounds = Rounds()
    with tempfile.TemporaryDirectory(prefix="hiss-bench-tls-", dir=bench.folder) as folder:
        cert, key = _certificate(Path(folder))
        data = Path(folder) / "data"
        data.mkdir()
        settings = (f"tls_cert={cert}", f"tls_key={key}", "kernels=off")
        with (
            bare.serve("receiver", cert, key) as port,
            started(data, secrets.token_urlsafe(24), *settings, ca=cert) as node,
        ):
            node.bucket("memory", "memory")
            receiver = Endpoint("127.0.0.1", port, ca=cert)
            for number in range(bench.rounds + 1):
                node.settle()
                ceiling = load.run(Plan(receiver, "PUT", "/bare/", LARGE_BYTES, ROUND_OBJECTS)).bytes_per_s
                before_s = node.cpu_s()
                outcome = load.run(Plan(node.endpoint, "PUT", f"/memory/{number}-", LARGE_BYTES, ROUND_OBJECTS))
                if number:  # the first round touches the arena
                    rounds.cpu.append((node.cpu_s() - before_s) / (outcome.bytes / 1e9))
                    rounds.ceilings.append(ceiling)
                    rounds.values.append(outcome.bytes_per_s)
    return rounds.figure("PUT 64 MiB over TLS, memory", "GB/s", 1e9, "bare TLS receiver", 0.85)


def _certificate(folder: Path) -> tuple[str, str]:
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key,
         "-out", cert, "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return cert, key
