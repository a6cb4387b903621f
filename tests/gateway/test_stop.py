"""STOP on a real node: what an instrument is told when a kernel has seen enough, and what is stored then."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
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
        self._http = httpx.Client(timeout=60, verify=False)
        assert self.request("PUT", "").status_code == 200
        poll(
            lambda: self.request("PUT", "/_kernels/enough.py", KERNEL.encode()).status_code == 200,
            "the node takes a kernel",
            60,
        )
        self.body = np.random.default_rng(5).integers(0, 9, (FRAMES, *SHAPE), np.uint16).tobytes()

    def close(self) -> None:
        self._http.close()

    def setting(self, stop: str, durability: str = "disk") -> Instrument:
        """With ``hiss.stop`` and ``hiss.durability`` as given."""
        wanted = {"hiss.stop": stop, "hiss.durability": durability}
        pairs = "".join(f"<Tag><Key>{name}</Key><Value>{value}</Value></Tag>" for name, value in wanted.items())
        tags = f"<Tagging><TagSet>{pairs}</TagSet></Tagging>"
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
        lines = self._http.get(self.node.url("control") + "/metrics").text.splitlines()
        return sum(
            float(line.split()[1]) for line in lines if line.startswith('hiss_kernel_frames_total{verdict="keep"}')
        )

    def halting(self, wire: bytes, at: int) -> Iterator[bytes]:
        before = self.judged()
        yield wire[:at]
        self.poll(lambda: self.judged() > before, "the first frames are judged")
        for start in range(at, len(wire), 1 << 18):
            yield wire[start : start + (1 << 18)]

    def send(
        self, key: str, wire: bytes | None = None, payload_hash: str = UNSIGNED, bare: bool = False, **headers: str
    ) -> httpx.Response:
        """``bare``: the body says itself what its frames are like."""
        wire = self.body if wire is None else wire
        dtype = {"x_amz_meta_frame_dtype": "uint16", "x_amz_meta_frame_shape": "64,128"}
        first = FIRST * len(self.body) // FRAMES
        headers = {"content_length": str(len(wire)), **({} if bare else dtype), **headers}
        return self.request("PUT", f"/{key}", self.halting(wire, first), payload_hash, **headers)

    def stored(self, key: str) -> bytes:
        return self.request("GET", f"/{key}").content

    def boto3(self) -> Any:
        keys = self.node.keys()
        return boto3.client(
            "s3",
            endpoint_url=self._url,
            aws_access_key_id=keys["access_key"],
            aws_secret_access_key=keys["secret_key"],
            region_name="us-east-1",
        )

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


def npy(*arrays: np.ndarray) -> bytes:
    target = io.BytesIO()
    for array in arrays:
        np.save(target, array)
    return target.getvalue()


def arrays_of(body: bytes) -> list[np.ndarray]:
    source, found = io.BytesIO(body), []
    while source.tell() < len(body) and body[source.tell() :].startswith(b"\x93NUMPY"):
        found.append(np.load(source))
    return found


@pytest.mark.parametrize("durability", ["disk", "memory"])
def test_what_arrived_of_an_npy_is_an_npy(instrument: Instrument, durability: str) -> None:
    detector = instrument.setting("discard", durability)
    frames = np.frombuffer(detector.body, np.uint16).reshape(FRAMES, *SHAPE)
    body = npy(frames)
    client = detector.boto3()
    for number, claims in enumerate(sums(body)):
        key = f"{durability}/{number}.npy"
        answer = detector.send(key, wire=claims.pop("wire", body), bare=True, **claims)
        assert answer.status_code == 200, answer.text
        told = answer.headers["x-hiss-truncated"]
        found = client.get_object(Bucket=detector.bucket, Key=key, ChecksumMode="ENABLED")
        stored = found["Body"].read()
        left = np.load(io.BytesIO(stored))
        count = int(told.split(";")[0].removeprefix("frames="))
        assert FIRST - 1 <= count == len(left) < FRAMES
        np.testing.assert_array_equal(left, frames[:count])
        assert found["ChecksumCRC64NVME"] == crc64(stored) if "ChecksumCRC64NVME" in found else True
        for name in ("crc32", "crc32c", "crc64nvme"):
            recorded = found["ResponseMetadata"]["HTTPHeaders"].get(f"x-amz-checksum-{name}")
            size = 8 if name == "crc64nvme" else 4
            value = getattr(checksums, name)(stored).to_bytes(size, "big")
            assert recorded in (None, base64.b64encode(value).decode())
        assert any(name.startswith("x-amz-checksum-crc") for name in found["ResponseMetadata"]["HTTPHeaders"])
        assert found["Metadata"]["hiss-truncated"] == told
        with detector.product(key) as file:
            assert file["entry/state/seen"][0] == STOP_AT + 1
            assert file["entry/frames/received"][()] == count


def test_the_last_of_several_arrays_is_mended_too(instrument: Instrument) -> None:
    detector = instrument.setting("discard")
    frames = np.frombuffer(detector.body, np.uint16).reshape(FRAMES, *SHAPE)
    body = npy(frames[:9], frames[9:])
    assert detector.send("several/a.npy", wire=body, bare=True).status_code == 200
    client = detector.boto3()
    stored = client.get_object(Bucket=detector.bucket, Key="several/a.npy")["Body"].read()
    first, second = arrays_of(stored)
    assert FIRST - 10 <= len(second) < FRAMES - 9
    np.testing.assert_array_equal(np.concatenate([first, second]), frames[: 9 + len(second)])
    # What is stored is read like anything else: a copy of it is reduced from disk.
    detector.setting("ignore")
    copied = detector.request("PUT", "/several/b.npy", x_amz_copy_source=f"{detector.bucket}/several/a.npy")
    assert copied.status_code == 200
    with detector.product("several/b.npy") as file:
        assert file["entry/state/seen"][0] == STOP_AT + 1
        assert file["entry/frames/received"][()] == 9 + len(second)


def test_a_worker_dies_with_a_mended_header(start_node: Callable[..., Any], poll: Poll, tmp_path: Path) -> None:
    """Between the rewritten header and the commit: nothing was acknowledged, nothing is there, and the sender's retry is."""
    flag = tmp_path / "crashpoint"
    node = start_node(launcher=("env", f"HISS_CRASHPOINT_ONCE={flag}"))
    detector = Instrument(node, poll)
    body = npy(np.frombuffer(detector.body, np.uint16).reshape(FRAMES, *SHAPE))
    flag.write_text("cut-mended")
    with pytest.raises(httpx.TransportError):
        detector.send("a.npy", wire=body, bare=True)
    assert not flag.exists()

    def retried() -> httpx.Response | None:
        try:
            assert detector.request("HEAD", "/a.npy").status_code in (404, 503)
            return detector.send("a.npy", wire=body, bare=True)
        except httpx.TransportError:
            return None

    answer = poll(retried, "the next worker takes it", 60)
    assert answer.status_code == 200, answer.text
    assert FIRST - 1 <= len(np.load(io.BytesIO(detector.stored("a.npy")))) < FRAMES
    detector.close()
    assert node.stop() == 0
    done = node.hiss("fsck", "--payload", "--json")
    assert done.returncode == 0, done.stdout


def test_over_tls(start_node: Callable[..., Any], certificate: tuple[Path, Path], poll: Poll) -> None:
    """The body is decrypted into buffers that are not the span's own: the cut falls elsewhere, and the promises are the same."""
    node = start_node("--tls-cert", str(certificate[0]), "--tls-key", str(certificate[1]))
    detector = Instrument(node, poll)
    try:
        for number, claims in enumerate((sums(detector.body)[0], sums(detector.body)[-1])):
            answer = detector.setting("discard").send(f"run/{number}.raw", **claims)
            assert answer.status_code == 200, answer.text
            told = dict(part.split("=") for part in answer.headers["x-hiss-truncated"].split("; "))
            stored = detector.stored(f"run/{number}.raw")
            assert (int(told["bytes"]), stored) == (len(stored), detector.body[: len(stored)])
            with detector.product(f"run/{number}.raw") as file:
                assert file["entry/frames/stopped_at"][()] == STOP_AT
                assert file["entry/frames/discarded_bytes"][()] == len(detector.body) - len(stored)
        answer = detector.setting("answer").send("early.raw")
        assert (answer.status_code, "<Code>StreamStopped</Code>" in answer.text) == (409, True)
        stored = detector.stored("early.raw")
        assert f"<Bytes>{len(stored)}</Bytes>" in answer.text
        assert stored == detector.body[: len(stored)]
    finally:
        detector.close()
        assert node.stop() == 0
