"""What goes to a cluster's machines and what comes back: plain values, as bytes, so that nothing of ours is ever pickled.

In and out: ``Task`` and ``Answer``. A task is self-contained but for the bytes of objects and parameter arrays, which are read
where it runs. What always holds: an answer says of every object of its task what became of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ingest.records import FrameGeometry, ObjectRecord, ObjectState

Params = dict[str, int | float]


class ArrayPlace(msgspec.Struct, frozen=True, array_like=True):
    """The version of a parameter array that is meant."""

    name: str
    key: bytes
    etag: str
    length: int
    crc64nvme: int


class Stage(msgspec.Struct, frozen=True, array_like=True):
    """One kernel of a chain; ``arrays`` are the same in all settings."""

    name: str
    source: str
    arrays: tuple[ArrayPlace, ...] = ()


class Recipe(msgspec.Struct, frozen=True):
    """``settings``: parameters of every stage, one item a parameter epoch."""

    bucket: str
    stages: tuple[Stage, ...]
    settings: tuple[tuple[Params, ...], ...]


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """One version. ``epochs``: (first frame, number of the settings); they hold where the object's CRC64NVME is ``of_crc``
    (or ``of_crc`` is None), else the first settings do."""

    key: bytes
    etag: str
    length: int
    epochs: tuple[tuple[int, int], ...] = ((0, 0),)
    of_crc: int | None = None


class Part(msgspec.Struct, frozen=True, array_like=True):
    """Frames [first, stop) of the task's one object, with one of the settings."""

    first: int
    stop: int
    settings: int


class Task(msgspec.Struct, frozen=True):
    """``sequence``: the objects are one frame each and are judged in this order in one state. ``part``: see ``Part``.
    ``conclude``: run finish() over this state, of frames like ``geometry``'s, with settings ``epoch``; there are no objects
    then."""

    recipe: Recipe
    objects: tuple[Wanted, ...] = ()
    sequence: bool = False
    part: Part | None = None
    conclude: dict[str, bytes] | None = None
    geometry: FrameGeometry | None = None
    epoch: int = 0


class Judged(msgspec.Struct, frozen=True):
    """One version. ``failure``: why it was not judged; ``error``: why it never will be, which is what its product says;
    ``deferred``: one frame of an ordered kernel, to be judged in its turn."""

    key: bytes
    failure: str = ""
    error: str = ""
    deferred: bool = False
    single: bool = False
    crc64nvme: int = 0
    etag: str = ""
    length: int = 0
    modified_ns: int = 0
    version_id: str = "null"
    metadata: dict[str, str] = {}
    geometry: FrameGeometry | None = None
    layout: str = ""
    frames: int = 0
    gaps: tuple[tuple[int, int], ...] = ()
    trailing_bytes: int = 0
    epochs: tuple[tuple[int, int], ...] = ((0, 0),)
    verdicts: bytes = b""
    unreadable: tuple[tuple[int, int], ...] = ()
    stopped_at: int | None = None
    rows: bytes | None = None
    rows_left_out: int = 0
    feedback_events: int = 0
    state: dict[str, bytes] | None = None
    """None: it is in the answer's shared state."""
    result: dict[str, bytes] | None = None

    def record(self, bucket: str, object_id: bytes) -> ObjectRecord:
        """What lineage says about an input."""
        return ObjectRecord(
            bucket=bucket,
            key=self.key,
            version_id=self.version_id,
            object_id=object_id,
            sequence=0,
            state=ObjectState.BUFFERED,
            length=self.length,
            stored_length=self.length,
            etag=self.etag,
            crc64nvme=self.crc64nvme,
            modified_ns=self.modified_ns,
            owner="",
            metadata=self.metadata,
            geometry=self.geometry,
        )


class Answer(msgspec.Struct, frozen=True):
    """``shared``: by number of the settings, one state over all objects of one frame that have none of their own.
    ``software``: what it was computed with (kernels.lineage.Environment)."""

    objects: tuple[Judged, ...] = ()
    shared: dict[int, dict[str, bytes]] = {}
    result: dict[str, bytes] | None = None
    software: Mapping[str, str] = {}
    started_ns: int = 0
    ended_ns: int = 0
    bytes_read: int = 0


_encoder = msgspec.msgpack.Encoder()
_tasks = msgspec.msgpack.Decoder(Task)
_answers = msgspec.msgpack.Decoder(Answer)


def encode(what: Task | Answer) -> bytes:
    return _encoder.encode(what)


def task(data: bytes) -> Task:
    """Raises msgspec.MsgspecError."""
    return _tasks.decode(data)


def answer(data: bytes) -> Answer:
    """Raises msgspec.MsgspecError."""
    return _answers.decode(data)
