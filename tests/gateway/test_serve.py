"""``hiss serve`` whole: real processes, real ports; what dies comes back, and it stops cleanly."""

from __future__ import annotations

import json
import os
import signal
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from gateway.cli.s3put import sign
from gateway.users import KeyPair

Poll = Callable[..., Any]
ROLES = ("worker", "drain", "control", "zygote", "catalogue")


def make_bucket(node: Any, name: str) -> None:
    url = node.url("s3")
    headers = sign("PUT", f"/{name}", {"host": url.split("://")[1]}, KeyPair(**node.keys()), "us-east-1")
    answer = httpx.put(f"{url}/{name}", headers=headers, verify=False)
    assert answer.status_code == 200, answer.text


def test_a_node_needs_nothing_but_a_folder(real_node: Any) -> None:
    ports = real_node.ports()
    assert ports["pid"] == real_node.process.pid
    assert {type(ports[name]) for name in ("s3", "control", "dav")} == {int}
    health = httpx.get(real_node.url("control") + "/v1/health").json()
    assert (health["status"], health["workers_ready"], health["catalogue_ready"]) == ("ok", 1, True)
    assert {row["role"] for row in real_node.processes()} == set(ROLES)
    assert httpx.get(real_node.url("s3")).status_code == 403, "S3 answers and wants a signature"
    assert httpx.request("PROPFIND", real_node.url("dav")).status_code == 401
    assert real_node.data_dir.stat().st_mode & 0o077 == 0
    text = real_node.log.read_text()
    assert real_node.keys()["access_key"] in text
    assert real_node.keys()["secret_key"] not in text, "the secret is shown on a terminal only"


def test_a_second_node_is_refused_by_folder_and_by_port(real_node: Any, hiss: Poll, tmp_path: Path) -> None:
    again = hiss("serve", "--data", str(real_node.data_dir), "--s3-port", "0")
    assert again.returncode == 3
    assert again.stderr.splitlines()[-1] == (
        f"hiss: {real_node.data_dir} is held by another gateway (pid {real_node.process.pid}); "
        "stop it, or give another --data"
    )
    port = real_node.ports()["s3"]
    other = hiss("serve", "--data", str(tmp_path / "other"), "--host", "127.0.0.1", "--s3-port", str(port))
    assert other.returncode == 3
    assert f"hiss: port {port} (s3) is held by another gateway or program; give another --s3-port" in other.stderr


def test_what_is_killed_comes_back_and_the_node_takes_puts_again(real_node: Any, poll: Poll, tmp_path: Path) -> None:
    make_bucket(real_node, "phoenix")
    body = tmp_path / "frame"
    body.write_bytes(os.urandom(300_000))
    for role in ROLES:
        before = next(row for row in real_node.processes() if row["role"] == role)
        os.kill(before["pid"], signal.SIGKILL)

        def back(role: str = role, before: dict[str, Any] = before) -> bool:
            row = next(row for row in real_node.processes() if row["role"] == role)
            return row["state"] == "ready" and row["restarts"] > before["restarts"]

        poll(back, f"a new {role} is ready", 60)
        real_node.healthy()
        sent = real_node.hiss("send", str(body), f"s3://phoenix/{role}/", "--wait", "--json")
        assert sent.returncode == 0, sent.stdout + sent.stderr + real_node.log.read_text()
    metrics = httpx.get(real_node.url("control") + "/metrics").text
    for row in real_node.processes():
        if row["role"] in ROLES:
            assert f'hiss_process_restarts_total{{role="{row["role"]}"}} {float(row["restarts"])}' in metrics


def test_sighup_reads_the_users_again(real_node: Any, poll: Poll) -> None:
    entry = '[[user]]\nid = "{0}"\naccess_key = "{0}-key"\nsecret_key = "{0}-secret-0"\ngrants = ["read:*"]\n'
    url = real_node.url("control") + "/v1/status"

    def write(text: str) -> None:
        real_node.users_file.write_text(text)
        real_node.process.send_signal(signal.SIGHUP)

    def status(user: str, secret: str) -> int:
        return httpx.get(url, auth=(f"{user}-key", secret)).status_code

    write(entry.format("daq"))
    poll(lambda: status("daq", "daq-secret-0") == 200, "a user is let in")
    assert status("daq", "daq-secret-1") == 401
    write(entry.format("ops"))
    poll(lambda: status("ops", "ops-secret-0") == 200, "the new user is let in")
    poll(lambda: status("daq", "daq-secret-0") == 401, "the one who left is not")
    write("[[user]]\n")
    poll(lambda: "users were not reloaded" in real_node.log.read_text(), "a wrong file is reported")
    assert status("ops", "ops-secret-0") == 200, "and changes nothing"
    assert "secret-0" not in real_node.log.read_text()
    write("")
    poll(lambda: status("ops", "ops-secret-0") == 401, "an empty file disables")


def test_sigterm_ends_it_with_0_and_a_new_start_has_everything(real_node: Any, tmp_path: Path) -> None:
    make_bucket(real_node, "kept")
    body = tmp_path / "frame"
    body.write_bytes(os.urandom(5_000_000))
    assert real_node.hiss("send", str(body), "s3://kept/run/").returncode == 0
    keys = real_node.keys()
    assert real_node.stop() == 0
    assert not (real_node.data_dir / "run" / "ports.json").exists()
    assert real_node.hiss("status").returncode == 4
    real_node.again()
    assert real_node.keys() == keys
    status = real_node.hiss("run", "status", "s3://kept/run/", "--wait", "30", "--expect-bytes", "5000000", "--json")
    assert status.returncode == 0, status.stdout
    assert json.loads(status.stdout)["archived_bytes"] == 5_000_000


def test_tls_on_all_three_ports(start_node: Poll, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    node = start_node("--tls-cert", str(certificate[0]), "--tls-key", str(certificate[1]), "--set", "kernels=off")
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    for name, status in (("s3", 403), ("control", 404), ("dav", 401)):
        assert httpx.get(node.url(name) + "/", verify=trust).status_code == status, name
        plain = httpx.get(node.url(name).replace("https", "http"))
        assert plain.status_code == 400, name
        assert "TLS" in plain.text or "https" in plain.text, "HTTP to a TLS port is answered clearly"
    make_bucket(node, "sealed")
    body = tmp_path / "frame"
    body.write_bytes(os.urandom(3_000_000))
    assert node.hiss("send", str(body), "s3://sealed/run/", "--wait", "--ca", str(certificate[0])).returncode == 0
    assert node.hiss("kernel", "list", "sealed", "--json", "--ca", str(certificate[0])).stdout == "[]\n"
    absent = node.hiss("kernel", "params", "sealed/hits", "--ca", str(certificate[0]))
    assert (absent.returncode, absent.stderr) == (2, "hiss: s3://sealed/_kernels/hits.py: is not there\n")
    assert node.stop() == 0
