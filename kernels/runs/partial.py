"""What a partial holds: the state over some versions of a run, and which versions those are.

In: a finished batch, or the product of an object with many frames. Out: bytes that are stored, and the same values back. Only
what the gateway stored itself is read (the catalogue names it by its object id), and every length is checked all the same.

``state`` is the merged state of all members; of kernels with floating-point sums it is one state a member (an axis in
front), because their merge depends on the order, which is known only once the run closes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import h5py
import msgspec
import numpy as np
import numpy.typing as npt

from ingest.records import FrameGeometry, ObjectRecord, ObjectState
from kernels.contract import Kernel

StateArrays = dict[str, npt.NDArray[np.generic]]

FORMAT = 1
CONTENT_TYPE = "application/x-hiss-partial"


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
    rows: int = 0

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


class Origin(msgspec.Struct, frozen=True):
    """What made the states of a group: enough to admit the kernel again."""

    name: str
    source: str
    match: str
    params: dict[str, int | float]


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
    format: int = FORMAT

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
            state = {spec.name: np.asarray(entry["state"][spec.name][()], spec.dtype) for spec in kernel.state}
            counts = {name: int(entry["frames"][name][()]) for name in ("received", "kept", "dropped", "replaced")}
            verdicts = entry["verdicts"][()]
            gaps = tuple((int(first), int(count)) for first, count in entry["frames/gaps"][()])
            events = int(entry["frames/feedback_events"][()])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise BadPartial(str(error)) from None
    for spec in kernel.state:
        if state[spec.name].shape != spec.shape:
            raise BadPartial(f"state {spec.name} is {state[spec.name].shape}, not {spec.shape}")
    member = member_of(
        record,
        record.geometry,
        frames=counts["received"],
        kept=int(np.count_nonzero((verdicts == 1) | (verdicts == 3))),
        dropped=int(np.count_nonzero(verdicts == 0)),
        replaced=int(np.count_nonzero(verdicts == 2)),
        unreduced=int(np.count_nonzero(verdicts == 255)),
        gaps=gaps,
    )
    each = {name: array[np.newaxis] for name, array in state.items()}
    return Partial(origin, (member,), state_bytes(each), True, record.modified_ns, record.modified_ns, events)


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
