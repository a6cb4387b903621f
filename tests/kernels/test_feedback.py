"""Feedback on its way to the control process: a real socket, and what happens when nobody listens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ingest.counters import Counters
from ingest.ports import FeedbackEvent
from kernels.feedback import DECODER, MESSAGE_EVENTS_MAX, Allowance, SocketFeedback, Streams

Until = Callable[..., object]


def event(frame: int, kernel: str = "hits") -> FeedbackEvent:
    return FeedbackEvent("scan42", b"a.raw", kernel, frame, 1, frame / 2, 1)


class Listener:
    """The control process's end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[FeedbackEvent] = []
        self.messages = 0
        self.streams: list[list[tuple[str, str]]] = []

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        self.path.unlink(missing_ok=True)
        writers = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    length = int.from_bytes(await reader.readexactly(4), "little")
                    message = DECODER.decode(await reader.readexactly(length))
                    if isinstance(message, Streams):
                        self.streams.append(message.running)
                    else:
                        self.events += message.events
                        self.messages += 1
            writer.close()

        server = await asyncio.start_unix_server(serve, str(self.path))
        try:
            yield
        finally:
            server.close()
            for writer in writers:
                writer.close()
            await asyncio.sleep(0)


@pytest.fixture
def counters() -> Counters:
    return Counters(None, 0)


@pytest.fixture
def listener(tmp_path: Path) -> Listener:
    return Listener(tmp_path / "feedback.sock")


@contextlib.asynccontextmanager
async def sending(listener: Listener, counters: Counters, **options: float) -> AsyncIterator[SocketFeedback]:
    feedback = SocketFeedback(lambda: str(listener.path), counters, **options)  # type: ignore[arg-type]
    await feedback.start()
    try:
        yield feedback
    finally:
        await feedback.close()


async def test_events_arrive_in_order_in_bounded_messages(listener: Listener, counters: Counters, until: Until) -> None:
    events = [event(frame) for frame in range(3 * MESSAGE_EVENTS_MAX)]
    async with listener.open(), sending(listener, counters) as feedback:
        feedback.publish(events)
        await until(lambda: len(listener.events) == len(events))
    assert listener.events == events
    assert listener.messages == 3
    assert counters.cell("hiss_feedback_events_total").value() == len(events)


async def test_events_wait_for_a_control_process_that_restarts(
    listener: Listener, counters: Counters, until: Until
) -> None:
    async with sending(listener, counters) as feedback:
        feedback.publish([event(0)])
        async with listener.open():
            await until(lambda: len(listener.events) == 1)
        await until(lambda: feedback._wire is None)
        feedback.publish([event(1)])
        async with listener.open():
            await until(lambda: len(listener.events) == 2)
    assert [item.frame for item in listener.events] == [0, 1]


async def test_a_full_queue_drops_and_counts(listener: Listener, counters: Counters) -> None:
    async with sending(listener, counters, queue_events_max=10) as feedback:
        feedback.publish([event(frame) for frame in range(25)])
        assert counters.cell("hiss_feedback_dropped_total").value() == 15
        assert counters.cell("hiss_feedback_events_total").value() == 10


async def test_one_kernel_cannot_use_up_anothers_rate(listener: Listener, counters: Counters, until: Until) -> None:
    async with listener.open(), sending(listener, counters, rate_per_s=0.001, burst=20) as feedback:
        feedback.publish([event(frame, "loud") for frame in range(100)])
        feedback.publish([event(frame, "quiet") for frame in range(5)])
        await until(lambda: len(listener.events) == 25)
    assert [item.kernel for item in listener.events].count("quiet") == 5
    assert counters.cell("hiss_feedback_dropped_total").value() == 80


async def test_running_streams_are_told_once_they_change_and_to_every_new_listener(
    listener: Listener, counters: Counters, until: Until
) -> None:
    async with sending(listener, counters) as feedback:
        feedback.stream_opened("scan42", ["hits", "rings"])
        feedback.stream_opened("scan42", ["hits"])
        async with listener.open():
            await until(lambda: listener.streams == [[("scan42", "hits"), ("scan42", "rings")]])
            feedback.stream_closed("scan42", ["hits", "rings"])
            await until(lambda: listener.streams[1:] == [[("scan42", "hits")]])
            feedback.publish([event(0)])
            feedback.stream_closed("scan42", ["hits"])
            await until(lambda: listener.streams[2:] == [[]])
            assert len(listener.events) == 1, "what a stream emitted comes before its end"
        await until(lambda: feedback._wire is None)
        async with listener.open():
            await until(lambda: listener.streams[3:] == [[]])


def test_an_allowance_refills_with_time_up_to_its_burst() -> None:
    allowance = Allowance(10.0, 5.0, 0.0)
    assert allowance.take(9, 0.0) == 5
    assert allowance.take(1, 0.05) == 0
    assert allowance.take(9, 0.31) == 3
    assert allowance.take(99, 1000.0) == 5
