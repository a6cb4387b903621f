"""What a partial holds: the state over some versions of a run, and which versions those are.

In: a finished batch, or the product of an object with many frames. Out: bytes that are stored, and the same values back. Only
what the gateway stored itself is read (the catalogue names it by its object id), and every length is checked all the same.

``state`` is the merged state of all members; of kernels with floating-point sums it is one state a member (an axis in
front), because their merge depends on the order, which is known only once the run closes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from urllib.parse import unquote_to_bytes

import h5py
import msgspec
import numpy as np
import numpy.typing as npt

from ingest.records import FrameGeometry, ObjectRecord, ObjectState
from kernels.attach import Attachment
from kernels.contract import DROP, KEEP, REPLACE, STOP, Kernel
from kernels.lineage import ArrayUse, Settings, StageSettings
from kernels.verdicts import AFTER_STOP, UNREDUCED

StateArrays = dict[str, npt.NDArray[np.generic]]

FORMAT = 1
CONTENT_TYPE = "application/x-hiss-partial"


MEMBER_BYTES = 400
"""Memory that a member takes, about."""


class BadPartial(ValueError):
    """The bytes are no partial of this kernel."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One version, and what the kernel said about its frames."""

    object_id: bytes
    key: bytes
    version_id: str
    etag: str
    crc64nvme: int
    length: int
    modified_ns: int
    geometry: FrameGeometry | None
    frames: int
    kept: int
    dropped: int
    replaced: int = 0
    unreduced: int = 0
    gaps: tuple[tuple[int, int], ...] = ()
    after_stop: int = 0
    rows: int = 0
    epochs: tuple[tuple[int, int], ...] = ((0, 0),)
    """(first frame, number in ``Origin.settings``)"""

    def record(self, bucket: str) -> ObjectRecord:
        """What lineage says about an input; where its bytes lie now is not in it."""
        return ObjectRecord(
            bucket=bucket,
            key=self.key,
            version_id=self.version_id,
            object_id=self.object_id,
            sequence=0,
            state=ObjectState.BUFFERED,
            length=self.length,
            stored_length=self.length,
            etag=self.etag,
            crc64nvme=self.crc64nvme,
            modified_ns=self.modified_ns,
            owner="",
        )


class Stage(msgspec.Struct, frozen=True, array_like=True):
    """One kernel of a chain."""

    name: str
    source: str


class ArrayOrigin(msgspec.Struct, frozen=True, array_like=True):
    """The version of a parameter array that was used."""

    key: bytes
    object_id: bytes
    crc64nvme: int


class StageValues(msgspec.Struct, frozen=True, array_like=True):
    params: dict[str, int | float]
    arrays: dict[str, ArrayOrigin] = {}


class Origin(msgspec.Struct, frozen=True):
    """What made the states of a group: enough to admit its kernels again, and for the lineage."""

    match: str
    stages: tuple[Stage, ...]
    """The kernel itself comes last."""
    settings: tuple[tuple[StageValues, ...], ...]
    """Of every stage, in the order of the epochs of a member."""
    device: str = "cpu"
    """What was asked for: members say themselves what they ran on."""

    def lineage(self) -> tuple[Settings, ...]:
        return tuple(
            tuple(
                StageSettings(
                    stage.params,
                    {
                        name: ArrayUse(array.key, array.object_id, array.crc64nvme, np.zeros(0, np.uint8))
                        for name, array in stage.arrays.items()
                    },
                )
                for stage in epoch
            )
            for epoch in self.settings
        )


def origin_of(attachment: Attachment, *later: Attachment) -> Origin:
    """``later``: settings that held from some frame on."""
    stages = tuple(Stage(stage.name, stage.kernel.source) for stage in attachment.stages)
    return Origin(attachment.match, stages, tuple(map(_values, (attachment, *later))), attachment.device)


def _values(attachment: Attachment) -> tuple[StageValues, ...]:
    return tuple(
        StageValues(
            dict(stage.params),
            {name: ArrayOrigin(use.key, use.object_id, use.crc64nvme) for name, use in stage.arrays.items()},
        )
        for stage in attachment.stages
    )


class Partial(msgspec.Struct, frozen=True):
    origin: Origin
    members: tuple[Member, ...]
    state: dict[str, bytes]
    """C order, little-endian."""
    each: bool
    """``state`` has one state a member."""
    started_ns: int
    ended_ns: int
    feedback_events: int = 0
    rows: bytes = b""
    """Of all members, in their order."""
    rows_left_out: int = 0
    format: int = FORMAT

    @property
    def size_bytes(self) -> int:
        """Memory it takes, about."""
        return sum(map(len, self.state.values())) + len(self.rows) + MEMBER_BYTES * len(self.members)

    def table(self, kernel: Kernel) -> npt.NDArray[np.void] | None:
        """The rows, in the order of the members; None where the kernel has none. Raises BadPartial."""
        if kernel.rows is None:
            return None
        try:
            table = np.frombuffer(self.rows, kernel.rows.dtype)
        except ValueError as error:
            raise BadPartial(str(error)) from None
        if len(table) != sum(member.rows for member in self.members):
            raise BadPartial("its rows are not those of its members")
        return table

    def only(self, kernel: Kernel, keys: frozenset[bytes]) -> Partial:
        """What is left of one with a state a member once others than ``keys`` have gone. Raises BadPartial."""
        stay = [number for number, member in enumerate(self.members) if member.key in keys]
        arrays, table = self.arrays(kernel), self.table(kernel)
        if table is not None:
            ends = np.cumsum([member.rows for member in self.members])
            parts = np.split(table, ends[:-1])
            table = np.concatenate([table[:0], *(parts[number] for number in stay)])
        return msgspec.structs.replace(
            self,
            members=tuple(self.members[number] for number in stay),
            state=state_bytes({name: array[stay] for name, array in arrays.items()}),
            rows=b"" if table is None else table.tobytes(),
        )

    def arrays(self, kernel: Kernel) -> StateArrays:
        """Read-only views of ``state``. Raises BadPartial."""
        shape = (len(self.members),) if self.each else ()
        try:
            return {
                spec.name: np.frombuffer(self.state[spec.name], spec.dtype).reshape(shape + spec.shape)
                for spec in kernel.state
            }
        except (KeyError, ValueError) as error:
            raise BadPartial(f"its state does not fit the kernel: {error}") from None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Partial)


def encode(partial: Partial) -> bytes:
    return _encoder.encode(partial)


def decode(data: bytes | bytearray | memoryview) -> Partial:
    """Raises BadPartial."""
    try:
        partial = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise BadPartial(str(error)) from None
    if partial.format != FORMAT:
        raise BadPartial(f"format {partial.format} is not known")
    return partial


def state_bytes(arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, bytes]:
    return {name: np.ascontiguousarray(array).tobytes() for name, array in arrays.items()}


def from_product(data: bytes | bytearray, record: ObjectRecord, kernel: Kernel, origin: Origin) -> Partial:
    """The product of one version (kernels/product.py) as a partial of its run. Raises BadPartial."""
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            entry = file["entry"]
            return of_version(
                record,
                kernel,
                origin,
                state={spec.name: np.asarray(entry["state"][spec.name][()], spec.dtype) for spec in kernel.state},
                verdicts=entry["verdicts"][()],
                frames=int(entry["frames/received"][()]),
                gaps=tuple((int(first), int(count)) for first, count in entry["frames/gaps"][()]),
                epochs=tuple((int(first), int(number)) for _, first, number in entry["source/epochs"][()]),
                rows=_table(entry, kernel),
                feedback_events=int(entry["frames/feedback_events"][()]),
                rows_left_out=int(entry["frames/rows_left_out"][()]),
            )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise BadPartial(str(error)) from None


def of_version(
    record: ObjectRecord,
    kernel: Kernel,
    origin: Origin,
    *,
    state: StateArrays,
    verdicts: npt.NDArray[np.uint8],
    frames: int,
    gaps: tuple[tuple[int, int], ...],
    epochs: tuple[tuple[int, int], ...],
    rows: npt.NDArray[np.void] | None,
    feedback_events: int,
    rows_left_out: int,
) -> Partial:
    """What was found in one version, as a partial of its run. ``rows``: None, or ordered by frame. Raises BadPartial."""
    for spec in kernel.state:
        if state[spec.name].shape != spec.shape:
            raise BadPartial(f"state {spec.name} is {state[spec.name].shape}, not {spec.shape}")
    member = member_of(
        record,
        record.geometry,
        frames=frames,
        kept=int(np.count_nonzero((verdicts == KEEP) | (verdicts == STOP))),
        dropped=int(np.count_nonzero(verdicts == DROP)),
        replaced=int(np.count_nonzero(verdicts == REPLACE)),
        unreduced=int(np.count_nonzero(verdicts == UNREDUCED)),
        after_stop=int(np.count_nonzero(verdicts == AFTER_STOP)),
        gaps=gaps,
        rows=0 if rows is None else len(rows),
        epochs=epochs,
    )
    each = {name: array[np.newaxis] for name, array in state.items()}
    return Partial(
        origin=origin,
        members=(member,),
        state=state_bytes(each),
        each=True,
        started_ns=record.modified_ns,
        ended_ns=record.modified_ns,
        feedback_events=feedback_events,
        rows=b"" if rows is None else rows.tobytes(),
        rows_left_out=rows_left_out,
    )


def source_of(data: bytes | bytearray) -> tuple[bytes, FrameGeometry]:
    """The key of the version that a product is of, and the layout of its frames. Raises BadPartial."""
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            source = file["entry/source"]
            location, dtype, shape = (source[name].asstr()[0] for name in ("location", "dtype", "shape"))
            origin = int(source["origin"][0])
        sizes = tuple(int(size) for size in shape.split(","))
        frame_bytes = math.prod(sizes) * np.dtype(dtype).itemsize
    except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise BadPartial(str(error)) from None
    key = unquote_to_bytes(location.removeprefix("s3://").partition("/")[2])
    return key, FrameGeometry(dtype, sizes, origin, frame_bytes)


def _table(entry: h5py.Group, kernel: Kernel) -> npt.NDArray[np.void] | None:
    if kernel.rows is None:
        return None
    group = entry["rows"]
    names = kernel.rows.dtype.names or ()
    table = np.zeros(len(group[names[0]]), kernel.rows.dtype)
    for name in names:
        table[name] = group[name][()]
    return table


def member_of(record: ObjectRecord, geometry: FrameGeometry | None, *, frames: int, **counts: object) -> Member:
    return Member(
        object_id=record.object_id,
        key=record.key,
        version_id=record.version_id,
        etag=record.etag,
        crc64nvme=record.crc64nvme,
        length=record.length,
        modified_ns=record.modified_ns,
        geometry=geometry,
        frames=frames,
        **counts,  # type: ignore[arg-type]
    )
