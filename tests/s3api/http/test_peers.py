"""Other people's clients against the server: curl, httpx, and the AWS SDK with its aws-chunked uploads."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import ssl
import subprocess

import aiobotocore.session
import httpx
import pytest
from aiobotocore.config import AioConfig

from s3api.http.message import HttpError, Response

BODY = os.urandom(1 << 20) * 5


@pytest.fixture
def curl():
    """Runs curl in a thread: the server under test shares the test's loop."""
    program = shutil.which("curl")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("curl is missing")
        pytest.skip("curl is not installed")

    async def run(*arguments: str) -> bytes:
        command = [program, "--silent", "--show-error", "--max-time", "10", *arguments]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=60, input=BODY)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    "how", [["-H", "Expect: 100-continue"], ["-H", "Expect:"], ["-H", "Transfer-Encoding: chunked"]]
)
async def test_curl_uploads(start, curl, how):
    running = await start()
    url = f"http://127.0.0.1:{running.port}/sink?size=6000000"
    assert await curl("-T", "-", *how, url) == hashlib.sha256(BODY).hexdigest().encode()


async def test_curl_sees_a_refusal_with_and_without_waiting_for_100(start, curl):
    running = await start()
    url = f"http://127.0.0.1:{running.port}/refuse"
    for how in ("Expect: 100-continue", "Expect:"):
        answer = await curl("-T", "-", "-H", how, "-w", "%{http_code}", url)
        assert answer == b"slow down503"


async def test_curl_over_tls_reuses_its_connection(start, curl, server_tls, tls_files):
    running = await start(tls=server_tls)
    url = f"https://localhost:{running.port}/"
    answer = await curl("--cacert", str(tls_files[0]), "--ipv4", url, url, url, "-w", "%{num_connects},", "-o", "/dev/null",
                        "-o", "/dev/null", "-o", "/dev/null")  # fmt: skip
    assert answer == b"1,0,0,"


async def test_httpx_on_one_connection(start):
    running = await start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.port}") as client:
        for _ in range(3):
            answer = await client.put("/sink?size=6000000", content=BODY)
            assert answer.text == hashlib.sha256(BODY).hexdigest()
            assert (await client.get("/stream?n=50")).text.count(",") == 50
            assert (await client.head("/head")).headers["content-length"] == "12345"
            assert (await client.get("/empty")).status_code == 204


class Store:
    """As little of S3 as the SDK needs to put and get one object."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.stored = b""

    async def __call__(self, request) -> Response:
        if request.method != "PUT":
            return Response(200, [("ETag", '"e"')], self.stored)
        coding = request.headers.get("x-amz-content-sha256")
        self.seen.append((coding, request.headers.get("transfer-encoding")))
        if coding.startswith("STREAMING-"):
            length = int(request.headers["x-amz-decoded-content-length"])
            request.body.unwrap_aws_chunked(length, False, coding.endswith("-TRAILER"), None)
        self.stored = await request.body.read(8 << 20)
        if coding.startswith("STREAMING-") and "x-amz-checksum-crc32" not in request.body.trailers:
            raise HttpError(400, "InvalidRequest", "no trailer")
        return Response(200, [("ETag", '"e"')])


@pytest.mark.parametrize("secure", [False, True])
async def test_the_aws_sdk_puts_and_gets(start, server_tls, tls_files, secure):
    store = Store()
    running = await start(tls=server_tls if secure else None, handler=store)
    async with aiobotocore.session.get_session().create_client(
        "s3",
        endpoint_url=f"{'https' if secure else 'http'}://localhost:{running.port}",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
        verify=str(tls_files[0]) if secure else None,
        config=AioConfig(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
    ) as client:
        for _ in range(2):
            await client.put_object(Bucket="b", Key="k", Body=BODY)
            answer = await client.get_object(Bucket="b", Key="k")
            assert await answer["Body"].read() == BODY
    expected = ("STREAMING-UNSIGNED-PAYLOAD-TRAILER", "chunked") if secure else (store.seen[0][0], "")
    assert store.seen == [expected, expected]


async def test_a_peer_that_rejects_the_certificate_harms_nobody_else(start, server_tls):
    running = await start(tls=server_tls)
    suspicious = ssl.create_default_context()
    with pytest.raises(ssl.SSLError):
        await asyncio.wait_for(asyncio.open_connection("127.0.0.1", running.port, ssl=suspicious), 30)
    async with httpx.AsyncClient(verify=False) as client:
        assert (await client.get(f"https://127.0.0.1:{running.port}/")).status_code == 200
