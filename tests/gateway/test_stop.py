"""STOP on a real node: what an instrument is told when a kernel has seen enough, and what is stored then."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import httpx
import numpy as np
import pytest
from awscrt import checksums
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

SHAPE = (64, 128)
FRAMES, STOP_AT, FIRST = 600, 20, 64
KERNEL = f"""
STATE = {{"seen": ("int64", (1,), "sum")}}

def frame(frame, params, state, index, out, feedback):
    state.seen[0] += 1
    return STOP if index == {STOP_AT} else KEEP
"""
Poll = Callable[..., Any]
UNSIGNED = "UNSIGNED-PAYLOAD"


class _Signer(S3SigV4Auth):
    def payload(self, request: AWSRequest) -> str:
        return str(request.context["payload_hash"])


class Instrument:
    """Sends a stream the way a detector does: a part, then the rest once the kernel has judged that part."""

    def __init__(self, node: Any, poll: Poll) -> None:
        self.node = node
        self.poll = poll
        self.bucket = f"stop-{secrets.token_hex(4)}"
        keys = node.keys()
        self._keys = Credentials(keys["access_key"], keys["secret_key"])
        self._url = node.url("s3")
        self._http = httpx.Client(timeout=60)
        assert self.request("PUT", "").status_code == 200
        poll(
            lambda: self.request("PUT", "/_kernels/enough.py", KERNEL.encode()).status_code == 200,
            "the node takes a kernel",
            60,
        )
        self.body = np.random.default_rng(5).integers(0, 9, (FRAMES, *SHAPE), np.uint16).tobytes()

    def close(self) -> None:
        self._http.close()

    def setting(self, stop: str) -> Instrument:
        """With ``hiss.stop`` as given."""
        tags = f"<Tagging><TagSet><Tag><Key>hiss.stop</Key><Value>{stop}</Value></Tag></TagSet></Tagging>"
        assert self.request("PUT", "?tagging", tags.encode()).is_success
        return self

    def request(
        self, method: str, path: str, body: Any = b"", payload_hash: str = "", **headers: str
    ) -> httpx.Response:
        whole = body if isinstance(body, bytes) else b""
        url = f"{self._url}/{self.bucket}{path}"
        request = AWSRequest(method, url, headers={name.replace("_", "-"): value for name, value in headers.items()})
        request.context["payload_hash"] = payload_hash or hashlib.sha256(whole).hexdigest()
        _Signer(self._keys, "s3", "us-east-1").add_auth(request)
        return self._http.request(method, url, content=body, headers=dict(request.headers))

    def judged(self) -> float:
        lines = httpx.get(self.node.url("control") + "/metrics").text.splitlines()
        return sum(
            float(line.split()[1]) for line in lines if line.startswith('hiss_kernel_frames_total{verdict="keep"}')
        )

    def halting(self, wire: bytes, at: int) -> Iterator[bytes]:
        before = self.judged()
        yield wire[:at]
        self.poll(lambda: self.judged() > before, "the first frames are judged")
        for start in range(at, len(wire), 1 << 18):
            yield wire[start : start + (1 << 18)]

    def send(self, key: str, wire: bytes | None = None, payload_hash: str = UNSIGNED, **headers: str) -> httpx.Response:
        wire = self.body if wire is None else wire
        dtype = {"x_amz_meta_frame_dtype": "uint16", "x_amz_meta_frame_shape": "64,128"}
        first = FIRST * len(self.body) // FRAMES
        headers = {"content_length": str(len(wire)), **dtype, **headers}
        return self.request("PUT", f"/{key}", self.halting(wire, first), payload_hash, **headers)

    def stored(self, key: str) -> bytes:
        return self.request("GET", f"/{key}").content

    def run(self, prefix: str) -> dict[str, Any]:
        done = self.node.hiss("run", "status", f"s3://{self.bucket}/{prefix}", "--json")
        assert done.stdout, done
        status = dict(json.loads(done.stdout))
        assert "truncated" in status, done
        return status

    def product(self, key: str) -> Any:
        path = f"/_products/enough/{key}.nxs"
        self.poll(lambda: self.request("HEAD", path).status_code == 200, "the product is there")
        return h5py.File(io.BytesIO(self.request("GET", path).content))


@pytest.fixture(scope="module")
def instrument(real_node: Any, poll: Poll) -> Iterator[Instrument]:
    """One bucket for all: each bucket's kernels take memory regions of their own."""
    detector = Instrument(real_node, poll)
    yield detector
    detector.close()


def crc64(data: bytes) -> str:
    return base64.b64encode(checksums.crc64nvme(data).to_bytes(8, "big")).decode()


def chunked(body: bytes, crc32c: int) -> bytes:
    """aws-chunked with a trailing checksum."""
    parts = []
    for start in range(0, len(body), 1 << 16):
        chunk = body[start : start + (1 << 16)]
        parts.append(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    trailer = base64.b64encode(crc32c.to_bytes(4, "big"))
    return b"".join(parts) + b"0\r\nx-amz-checksum-crc32c:" + trailer + b"\r\n\r\n"


def sums(body: bytes) -> list[dict[str, Any]]:
    crc = checksums.crc32c(body)
    return [
        {"payload_hash": hashlib.sha256(body).hexdigest()},
        {"content_md5": base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()},
        {"x_amz_checksum_sha256": base64.b64encode(hashlib.sha256(body).digest()).decode()},
        {"x_amz_checksum_crc64nvme": crc64(body)},
        {
            "wire": chunked(body, crc),
            "payload_hash": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
            "content_encoding": "aws-chunked",
            "x_amz_decoded_content_length": str(len(body)),
            "x_amz_trailer": "x-amz-checksum-crc32c",
        },
    ]


def test_the_rest_is_read_and_dropped_and_what_arrived_is_stored(instrument: Instrument) -> None:
    detector = instrument.setting("discard")
    for number, claims in enumerate(sums(detector.body)):
        key = f"run/{number}.raw"
        answer = detector.send(key, **claims)
        assert answer.status_code == 200, answer.text
        told = dict(part.split("=") for part in answer.headers["x-hiss-truncated"].split("; "))
        stored = detector.stored(key)
        assert FIRST - 1 <= int(told["frames"]) < FRAMES
        assert (int(told["bytes"]), stored) == (len(stored), detector.body[: len(stored)])
        assert answer.headers["etag"].strip('"').endswith("-1")
        head = detector.request("HEAD", f"/{key}", x_amz_checksum_mode="ENABLED")
        if "x-amz-checksum-crc64nvme" in head.headers:
            assert head.headers["x-amz-checksum-crc64nvme"] == crc64(stored)
        with detector.product(key) as file:
            assert file["entry/state/seen"][0] == STOP_AT + 1
            assert file["entry/frames/stopped_at"][()] == STOP_AT
            assert file["entry/frames/discarded_bytes"][()] == len(detector.body) - len(stored)
            assert file["entry/frames/after_stop"][()] == int(told["frames"]) - STOP_AT - 1
    cuts = detector.run("run/")["truncated"]
    assert [(cut["key"], cut["stopped_at"]) for cut in cuts] == [(f"run/{number}.raw", STOP_AT) for number in range(5)]


def test_a_body_that_does_not_verify_is_refused_whole(instrument: Instrument) -> None:
    detector = instrument.setting("discard")
    wrong = bytearray(detector.body)
    wrong[-1] ^= 1
    for number, claims in enumerate(sums(bytes(wrong))):
        if "wire" in claims:
            claims["wire"] = chunked(detector.body, checksums.crc32c(bytes(wrong)))
        answer = detector.send(f"bad/{number}.raw", **claims)
        assert answer.status_code == 400, claims
        assert detector.request("HEAD", f"/bad/{number}.raw").status_code == 404


def test_an_early_answer_names_what_is_stored(instrument: Instrument) -> None:
    detector = instrument.setting("answer")
    answer = detector.send("early/a.raw")
    assert answer.status_code == 409
    assert "<Code>StreamStopped</Code>" in answer.text
    assert answer.headers["connection"] == "close"
    stored = detector.stored("early/a.raw")
    assert f"<Bytes>{len(stored)}</Bytes>" in answer.text
    assert stored == detector.body[: len(stored)]
    assert FIRST * 2 * 64 * 128 <= len(stored) < len(detector.body)
    with detector.product("early/a.raw") as file:
        assert file["entry/state/seen"][0] == STOP_AT + 1


def test_ignored_the_whole_body_is_stored(instrument: Instrument) -> None:
    detector = instrument.setting("ignore")
    answer = detector.send("all/a.raw")
    assert answer.status_code == 200
    assert "x-hiss-truncated" not in answer.headers
    assert detector.stored("all/a.raw") == detector.body
    with detector.product("all/a.raw") as file:
        assert file["entry/state/seen"][0] == STOP_AT + 1
        assert file["entry/frames/after_stop"][()] == FRAMES - STOP_AT - 1
        assert file["entry/frames/unreduced"][()] == 0
    assert detector.run("all/")["truncated"] == []


def test_a_copy_is_never_cut(instrument: Instrument) -> None:
    detector = instrument.setting("ignore")
    assert detector.send("copy/a.raw").status_code == 200
    detector.setting("discard")
    copy = detector.request("PUT", "/copy/b.raw", x_amz_copy_source=f"{detector.bucket}/copy/a.raw")
    assert copy.status_code == 200
    assert detector.stored("copy/b.raw") == detector.body
