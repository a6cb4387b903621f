"""A whole node: frames stream in, a kernel speaks, subscribers of every transport listen or hang, actions reach an IOC."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.cli.s3put import sign
from gateway.users import KeyPair

FRAME_BYTES = 128 * 128 * 2
HEADERS = {"x-amz-meta-frame-dtype": "<u2", "x-amz-meta-frame-shape": "128,128"}
KERNEL = b"""
def frame(frame, params, state, index, out, feedback):
    emit(feedback, 1, frame[0, 0])
    return KEEP
"""

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


class Subscriber:
    """An example of the documentation in a process of its own; ``frames`` are the numbers it has printed."""

    def __init__(self, kind: str, *arguments: str) -> None:
        self.frames: list[int] = []
        self.process = subprocess.Popen(
            [sys.executable, EXAMPLES / f"feedback_{kind}.py", *arguments], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("{"), "ready, or a heartbeat"
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if "frame" in event:
                self.frames.append(event["frame"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Beamline:
    """The node as an instrument, an administrator and a listener use it."""

    def __init__(self, node: Any, zmq_port: int) -> None:
        self.node = node
        self.keys = KeyPair(**node.keys())
        self.zmq_port = zmq_port
        self.actions: dict[str, tuple[str, ...]] = {}

    def s3(self, method: str, path: str, body: bytes = b"", query: str = "", **headers: str) -> httpx.Response:
        url = self.node.url("s3")
        fields = {"host": urlsplit(url).netloc, **headers}
        signed = sign(method, path, fields, self.keys, "us-east-1", query=query)
        return httpx.request(
            method, f"{url}{path}{'?' + query if query else ''}", headers=signed, content=body, timeout=60
        )

    def bucket(self, name: str, **actions: str) -> None:
        """A bucket with these actions and no others, whose kernel's sandbox is warm: frames are judged as they arrive."""
        if name not in self.actions:
            assert self.s3("PUT", f"/{name}").status_code in (200, 409)
            deadline = time.monotonic() + 80
            while (answer := self.s3("PUT", f"/{name}/_kernels/speak.py", KERNEL)).status_code == 503:
                assert time.monotonic() < deadline, "the zygote is not ready"
            assert answer.status_code == 200, answer.text
        answer = self.tag(name, **dict.fromkeys(self.actions.get(name, ()), "default"), **actions)
        assert answer.status_code == 204, answer.text
        self.actions[name] = tuple(actions)
        deadline = time.monotonic() + 60
        while not self._live(name):
            assert time.monotonic() < deadline, "the sandbox is not warm"

    def _live(self, bucket: str) -> bool:
        """Whether a frame is judged while its stream still runs."""
        url = f"{self.node.url('control')}/v1/feedback?bucket={bucket}&key_prefix=warm"
        with httpx.stream("GET", url, auth=(self.keys.access_key, self.keys.secret_key), timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("retry")
            with self.stream(bucket, f"warm-{time.monotonic_ns()}", 1) as send:
                send(0xFFFF)  # out of every action's range
            data = next(line for line in lines if line.startswith("data: ") and "frame" in line)
            return not json.loads(data.removeprefix("data: ")).get("late", False)

    def tag(self, bucket: str, **actions: str) -> httpx.Response:
        tags = {f"hiss.action.{name}": value for name, value in actions.items()}
        rows = "".join(f"<Tag><Key>{key}</Key><Value>{value}</Value></Tag>" for key, value in tags.items())
        return self.s3("PUT", f"/{bucket}", f"<Tagging><TagSet>{rows}</TagSet></Tagging>".encode(), "tagging=")

    @contextlib.contextmanager
    def stream(self, bucket: str, key: str, frames: int) -> Iterator[Callable[..., None]]:
        """A PUT of ``frames`` frames; call what it yields with the first pixel of each."""
        url = urlsplit(self.node.url("s3"))
        path = f"/{bucket}/{key}"
        fields = {"host": url.netloc, "content-length": str(frames * FRAME_BYTES), **HEADERS}
        signed = sign("PUT", path, fields, self.keys, "us-east-1")
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
        connection.putrequest("PUT", path, skip_host=True, skip_accept_encoding=True)
        for name, value in signed.items():
            connection.putheader(name, value)
        connection.endheaders()
        rest = bytes(FRAME_BYTES - 2)

        def send(*pixels: int) -> None:
            connection.send(b"".join(pixel.to_bytes(2, "little") + rest for pixel in pixels))

        try:
            yield send
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
        finally:
            connection.close()

    def ask(self, path: str) -> Any:
        answer = httpx.get(
            self.node.url("control") + path, auth=(self.keys.access_key, self.keys.secret_key), timeout=60
        )
        answer.raise_for_status()
        return answer.json()

    def action(self, bucket: str, name: str) -> Any:
        actions = self.ask(f"/v1/feedback/actions?bucket={bucket}")["actions"]
        return next(one for one in actions if one["name"] == name)

    @contextlib.contextmanager
    def subscriber(self, kind: str, bucket: str) -> Iterator[Subscriber]:
        control = (self.node.url("control"), bucket, self.keys.access_key, self.keys.secret_key)
        arguments = (f"tcp://127.0.0.1:{self.zmq_port}", bucket) if kind == "zmq" else control
        subscriber = Subscriber(kind, *arguments)
        try:
            yield subscriber
        finally:
            subscriber.close()


@pytest.fixture(scope="module")
def control_system(running_ioc: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with running_ioc(tmp_path_factory.mktemp("ioc")) as peer:
        yield peer


@pytest.fixture
def ioc(control_system: Any) -> Any:
    """The module's IOC, with nothing written yet."""
    control_system.journal.write_text("")
    return control_system


@pytest.fixture(scope="module")
def beamline(start_node: Callable[..., Any], control_system: Any) -> Iterator[Beamline]:
    """A node that publishes by ZeroMQ, and whose actions may write to some of the IOC's variables."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in control_system.environment.items():
            patch.setenv(name, value)
        node = start_node(
            "--set", "arena_bytes=256MiB", "--set", f"feedback_zmq=tcp://127.0.0.1:{port}",
            "--set", "feedback_targets=epics:BL1:ATT epics:BL1:SHUTTER epics:BL1:LIMITED",
        )  # fmt: skip
    yield Beamline(node, port)
    assert node.stop() == 0


@pytest.fixture
def bucket() -> str:
    """One for all: its sandbox stays warm."""
    return "scan"


@pytest.mark.parametrize("kind", ["sse", "websocket", "zmq"])
def test_a_stopped_subscriber_slows_nobody(
    beamline: Beamline, bucket: str, kind: str, poll: Callable[..., Any]
) -> None:
    beamline.bucket(bucket)
    rounds = []
    with beamline.subscriber(kind, bucket) as dead, beamline.subscriber(kind, bucket) as alive:
        for stop in (False, True):
            if stop:
                dead.process.send_signal(signal.SIGSTOP)
            before = len(alive.frames)
            began_s = time.perf_counter()
            with beamline.stream(bucket, f"{kind}-{stop}.raw", 2000) as send:
                for first in range(0, 2000, 50):
                    send(*range(first, first + 50))
            rounds.append(time.perf_counter() - began_s)
            poll(lambda before=before: len(alive.frames) >= before + 2000, "everything is heard", 30)
        assert alive.frames[-2000:] == list(range(2000))
        dead.process.send_signal(signal.SIGCONT)
        poll(lambda: len(dead.frames) >= 4000 or beamline.ask("/v1/status"), "it goes on", 10)
    # The machine is shared: a factor, not a figure.
    assert rounds[1] < 3 * rounds[0] + 1


def test_values_reach_the_ioc_within_range_and_rate(
    beamline: Beamline, bucket: str, ioc: Any, poll: Callable[..., Any]
) -> None:
    beamline.bucket(bucket, attenuate="code=1 target=epics:BL1:ATT min=0 max=100 rate=20/s")
    with beamline.subscriber("sse", bucket), beamline.stream(bucket, "a.raw", 30) as send:
        send(5)
        poll(lambda: ioc.written("BL1:ATT") == [5.0], "the first value is written")
        refused = beamline.action(bucket, "attenuate")["counts"]["range"]
        send(101, 60000)
        poll(lambda: beamline.action(bucket, "attenuate")["counts"]["range"] == refused + 2, "two are refused")
        began_s = time.monotonic()
        for value in range(10, 37):
            send(value)
        poll(lambda: ioc.written("BL1:ATT")[-1] == 36.0, "the newest follows")
        assert len(ioc.written("BL1:ATT")) <= 3 + 20 * (time.monotonic() - began_s)
    assert all(0 <= value <= 100 for value in ioc.written("BL1:ATT"))
    shown = beamline.action(bucket, "attenuate")
    assert (shown["permitted"], shown["last_value"], shown["last_outcome"]) == (True, 36.0, "sent")
    counts = shown["counts"]
    assert counts["sent"] + counts["rate"] + counts["superseded"] == 28
    status = beamline.ask("/v1/status")["feedback"]
    assert all(status["actions"][outcome] >= count for outcome, count in counts.items())
    assert status["bridges"] == {"epics": "connected"}


def test_events_and_notices_show_the_action(beamline: Beamline, bucket: str, ioc: Any) -> None:
    beamline.bucket(
        bucket, shutter="code=1 target=epics:BL1:SHUTTER min=0 max=1", other="code=1 target=epics:BL1:COUNT min=0 max=9",
        limited="code=1 target=epics:BL1:LIMITED min=0 max=10", silent="code=2 deadman=300ms",
    )  # fmt: skip
    url = f"{beamline.node.url('control')}/v1/feedback?bucket={bucket}"
    auth = (beamline.keys.access_key, beamline.keys.secret_key)
    heard: dict[str, dict[str, Any]] = {}
    with httpx.stream("GET", url, auth=auth, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("retry")
        with beamline.stream(bucket, "a.raw", 2) as send:
            send(8)
            kind = ""
            for line in lines:
                kind = line.removeprefix("event: ") if line.startswith("event: ") else kind
                if line.startswith("data: ") and kind != "ready":
                    heard.setdefault(kind, json.loads(line.removeprefix("data: ")))
                if heard.keys() >= {"feedback", "failed", "expired"}:
                    break
            send(0)
    assert heard["feedback"]["actions"] == {"shutter": "range", "other": "target", "limited": "taken"}
    assert (heard["failed"]["action"], heard["failed"]["value"]) == ("limited", 8.0)
    assert "above the drive limit" in heard["failed"]["reason"]
    assert (heard["expired"]["action"], heard["expired"]["reason"]) == (
        "silent", "nothing heard for 0.3 s while a stream runs"
    )  # fmt: skip
    assert ioc.written("BL1:COUNT") == [], "what the operator does not allow is not written"


DEADMAN = "code=1 target=epics:BL1:ATT min=0 max=100 rate=100/s deadman=1500ms safe=0"


def test_silence_of_a_running_stream_writes_the_safe_value(
    beamline: Beamline, bucket: str, ioc: Any, poll: Callable[..., Any]
) -> None:
    beamline.bucket(bucket, hold=DEADMAN)
    with beamline.stream(bucket, "a.raw", 3) as send:
        send(50)
        poll(lambda: ioc.written("BL1:ATT")[:1] == [50.0], "the kernel opens")
        poll(lambda: ioc.written("BL1:ATT") == [50.0, 0.0], "silence closes")
        send(60)
        poll(lambda: ioc.written("BL1:ATT") == [50.0, 0.0, 60.0], "the kernel is back")
        send(61)
    poll(lambda: not beamline.action(bucket, "hold")["streams_running"], "the stream is over")
    time.sleep(2.0)  # longer than the dead-man time: nothing may happen now
    assert ioc.written("BL1:ATT") == [50.0, 0.0, 60.0, 61.0]
    assert beamline.action(bucket, "hold")["counts"]["expired"] == 1


def test_a_worker_that_dies_mid_stream_leaves_no_shutter_open(
    beamline: Beamline, bucket: str, ioc: Any, poll: Callable[..., Any]
) -> None:
    beamline.bucket(bucket, close=DEADMAN)
    with (
        contextlib.suppress(OSError, http.client.HTTPException, AssertionError),
        beamline.stream(bucket, "b.raw", 2) as send,
    ):
        send(50)
        poll(lambda: ioc.written("BL1:ATT")[:1] == [50.0], "the kernel opens")
        worker = next(row for row in beamline.node.processes() if row["role"] == "worker")
        os.kill(worker["pid"], signal.SIGKILL)
        poll(lambda: ioc.written("BL1:ATT") == [50.0, 0.0], "silence closes")
        send(51)
    assert ioc.written("BL1:ATT") == [50.0, 0.0]


def test_a_hung_ioc_gets_its_safe_value_when_it_is_back_and_nothing_waits_for_it(
    beamline: Beamline, bucket: str, ioc: Any, poll: Callable[..., Any]
) -> None:
    beamline.bucket(bucket, safe=DEADMAN)
    with beamline.stream(bucket, "a.raw", 200) as send:
        send(50)
        poll(lambda: ioc.written("BL1:ATT")[:1] == [50.0], "the kernel opens")
        with ioc.hung():
            began_s = time.monotonic()
            for value in range(150):
                send(value % 100)
            poll(lambda: beamline.action(bucket, "safe")["counts"]["expired"], "it expires though the IOC hangs")
            assert time.monotonic() - began_s < 10
        poll(lambda: ioc.written("BL1:ATT")[-1] == 0.0, "the safe value comes through", 30)
        for value in range(49):
            send(value)


def test_a_bridge_that_dies_comes_back(beamline: Beamline, bucket: str, ioc: Any, poll: Callable[..., Any]) -> None:
    beamline.bucket(bucket, attenuate="code=1 target=epics:BL1:ATT min=0 max=100 rate=100/s")
    with beamline.stream(bucket, "a.raw", 2) as send:
        send(1)
        poll(lambda: ioc.written("BL1:ATT")[-1:] == [1.0], "written")  # what the test before it left may come first
        bridge = next(row for row in beamline.node.processes() if row["role"] == "epics")
        os.kill(bridge["pid"], signal.SIGKILL)
        poll(lambda: beamline.ask("/v1/status")["feedback"]["bridges"] == {"epics": "away"}, "away")
        poll(lambda: beamline.ask("/v1/status")["feedback"]["bridges"] == {"epics": "connected"}, "back")
        send(2)
        poll(lambda: ioc.written("BL1:ATT")[-1] == 2.0, "written again")


def test_only_administrators_set_actions_and_a_wrong_one_is_refused(beamline: Beamline, bucket: str) -> None:
    beamline.bucket(bucket)
    answer = beamline.tag(bucket, shutter="code=1 target=epics:X")
    assert answer.status_code == 400
    assert "an action with a target needs min and max" in answer.text
    users = '[[user]]\nid = "w"\naccess_key = "WRITER"\nsecret_key = "writer-secret-1"\ngrants = ["write:*"]\n'
    beamline.node.users_file.write_text(users)
    beamline.node.process.send_signal(signal.SIGHUP)
    writer = Beamline(beamline.node, 0)
    writer.keys = KeyPair("WRITER", "writer-secret-1")
    deadline = time.monotonic() + 60
    while writer.s3("PUT", f"/{bucket}/note.txt", b"x").status_code != 200:
        assert time.monotonic() < deadline
    assert writer.tag(bucket, shutter="code=1").status_code == 403
    assert beamline.tag(bucket, shutter="code=1").status_code == 204
