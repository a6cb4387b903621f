"""A machine that cannot confine kernels, played by a filter around the whole node that takes one system call away."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.cli.s3put import sign
from gateway.users import KeyPair

LANDLOCK_CREATE_RULESET = 444
SECCOMP = 317

WITHOUT = """
import ctypes, os, struct, sys
number, command = int(sys.argv[1]), sys.argv[2:]
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)  # no_new_privs
load, equal, answer = 0x20, 0x15, 0x06
program = [(load, 0, 0, 0), (equal, 0, 1, number), (answer, 0, 0, 0x00050000 | 38), (answer, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in program))
argument = ctypes.create_string_buffer(struct.pack("<H6xQ", len(program), ctypes.addressof(code)))
if libc.prctl(22, 2, argument, 0, 0) != 0:
    sys.exit(os.strerror(ctypes.get_errno()))
os.execv(command[0], command)
"""
KERNEL = """
STATE = {"n": ("int64", (1,), "sum")}


def frame(frame, params, state, index, out, feedback):
    state.n[0] += 1
    return KEEP
"""
Poll = Callable[..., Any]


def put(node: Any, path: str, body: bytes = b"", **metadata: str) -> httpx.Response:
    url = node.url("s3")
    headers = {f"x-amz-meta-{name.replace('_', '-')}": value for name, value in metadata.items()}
    headers = sign("PUT", path, {"host": url.split("://")[1], **headers}, KeyPair(**node.keys()), "us-east-1")
    return httpx.put(url + path, headers=headers, content=body, timeout=60)


def sandbox(node: Any) -> dict[str, str]:
    """Empty while a health check is too slow to say."""
    return dict(httpx.get(node.url("control") + "/v1/health").json().get("kernels", {"state": "", "reason": ""}))


def metric(node: Any) -> str:
    lines = httpx.get(node.url("control") + "/metrics").text.splitlines()
    return next(line for line in lines if line.startswith("hiss_kernels_refused "))


@pytest.fixture
def without(tmp_path: Path) -> Callable[[int], list[str]]:
    (tmp_path / "without.py").write_text(WITHOUT)
    return lambda number: [sys.executable, str(tmp_path / "without.py"), str(number)]


@pytest.mark.parametrize(
    ("number", "reason"), [(LANDLOCK_CREATE_RULESET, "Landlock is not available"), (SECCOMP, "seccomp: ")]
)
def test_no_kernel_runs_where_it_cannot_be_confined(
    number: int, reason: str, without: Callable[[int], list[str]], start_node: Callable[..., Any], poll: Poll
) -> None:
    node = start_node(launcher=without(number))
    poll(lambda: sandbox(node)["state"] == "refused", "the self-test has failed")
    assert reason in sandbox(node)["reason"]
    assert metric(node) == "hiss_kernels_refused 1.0"
    assert put(node, "/scan").status_code == 200
    refused = put(node, "/scan/_kernels/count.py", KERNEL.encode())
    assert refused.status_code == 400
    assert "no kernel runs here: this machine cannot confine kernels" in refused.text
    stored = put(node, "/scan/frames", bytes(128), frame_dtype="uint8", frame_shape="8,8")
    assert stored.status_code == 200, "ingest goes on"
    assert "refused" in node.hiss("status").stdout
    assert node.stop() == 0


def test_an_operator_may_accept_it(
    without: Callable[[int], list[str]], start_node: Callable[..., Any], poll: Poll
) -> None:
    node = start_node("--set", "kernels=unconfined", launcher=without(LANDLOCK_CREATE_RULESET))
    poll(lambda: sandbox(node)["state"] == "unconfined", "the self-test has failed and that was accepted")
    assert metric(node) == "hiss_kernels_refused 0.0"
    assert put(node, "/scan").status_code == 200
    assert put(node, "/scan/_kernels/count.py", KERNEL.encode()).status_code == 200
    assert put(node, "/scan/frames", bytes(128), frame_dtype="uint8", frame_shape="8,8").status_code == 200

    def product() -> bool:
        url = node.url("s3")
        path = "/scan/_products/count/frames.nxs"
        headers = sign("GET", path, {"host": url.split("://")[1]}, KeyPair(**node.keys()), "us-east-1")
        return httpx.get(url + path, headers=headers).status_code == 200

    poll(product, "the product is there")
    assert "the operator accepted that" in node.log.read_text()
    assert node.stop() == 0


def test_a_machine_that_can_says_so(real_node: Any, poll: Poll) -> None:
    poll(lambda: sandbox(real_node)["state"] == "confined", "the self-test has passed")
    assert metric(real_node) == "hiss_kernels_refused 0.0"
