"""How records lie in rows: the one place that packs and unpacks them. Pure; used by the writer and by every reader."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from ingest.cluster import places
from ingest.records import (
    ArchiveCopy,
    BucketRecord,
    Durability,
    Extent,
    FrameGeometry,
    FrameLedger,
    KernelEpoch,
    NodeRecord,
    ObjectRecord,
    ObjectState,
    PartRecord,
    RawVersion,
    Reservation,
    ReservationUse,
    Retention,
    UploadRecord,
    UserRecord,
    VersionAttributes,
)

Row = tuple[Any, ...]


class Detail(msgspec.Struct, frozen=True, array_like=True):
    """The parts of a record no query looks at. Stored: fields are only ever added at the end, with a default."""

    crc64nvme: int
    checksums: dict[str, str]
    checksum_type: str
    headers: dict[str, str]
    metadata: dict[str, str]
    geometry: FrameGeometry | None
    epochs: tuple[KernelEpoch, ...] = ()
    raw: RawVersion | None = None
    attributes: VersionAttributes = VersionAttributes()
    retention: Retention | None = None
    legal_hold: bool = False
    appends: int = 0
    mirror: tuple[Extent, ...] = ()


encode = msgspec.msgpack.Encoder().encode
decode_bucket = msgspec.msgpack.Decoder(BucketRecord).decode
decode_node = msgspec.msgpack.Decoder(NodeRecord).decode
decode_user = msgspec.msgpack.Decoder(UserRecord).decode
decode_upload = msgspec.msgpack.Decoder(UploadRecord).decode
decode_reservation = msgspec.msgpack.Decoder(Reservation).decode
decode_part = msgspec.msgpack.Decoder(PartRecord).decode
decode_object = msgspec.msgpack.Decoder(ObjectRecord).decode
decode_extents = msgspec.msgpack.Decoder(tuple[Extent, ...]).decode
decode_filters = msgspec.msgpack.Decoder(dict[str, str]).decode
decode_detail = msgspec.msgpack.Decoder(Detail).decode
decode_ledger = msgspec.msgpack.Decoder(FrameLedger).decode
decode_parts = msgspec.msgpack.Decoder(tuple[PartRecord, ...]).decode

_STATES = {state.value: state for state in ObjectState}
_DURABILITIES = {durability.value: durability for durability in Durability}
NO_EXTENTS = encode(())


def connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """A connection in autocommit mode (transactions are explicit). Raises sqlite3.Error."""
    mode = "ro" if read_only else "rwc"
    database = sqlite3.connect(
        f"file:{_uri(path)}?mode={mode}", uri=True, isolation_level=None, timeout=5.0, check_same_thread=False
    )
    # 8 MiB of page cache; what is not in it comes from the kernel's cache of the same file.
    database.execute("PRAGMA cache_size=-8192")
    if read_only:
        database.execute("PRAGMA query_only=1")
    return database


def _uri(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def signed(unsigned: int) -> int:
    """SQLite's integers are signed 64 bit: two's complement of a CRC64NVME."""
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned


def unsigned(signed_value: int) -> int:
    return signed_value & (1 << 64) - 1


def object_record(row: Row) -> ObjectRecord:
    """A row of ``statements.RECORD_COLUMNS``, with or without ``parts`` behind it."""
    (
        sequence, bucket, key, version_id, object_id, delete_marker, state, settled, durability, owner, codec, length,
        stored_length, etag, modified_ns, attempts, error, target, path, crc, verified_ns, detail_blob, ledger, extents,
    ) = row[:24]  # fmt: skip
    detail = decode_detail(detail_blob)
    parts = row[24] if len(row) > 24 else None
    return ObjectRecord(
        bucket=bucket,
        key=key,
        version_id=version_id,
        object_id=object_id,
        sequence=sequence,
        state=_STATES[state],
        length=length,
        stored_length=stored_length,
        etag=etag,
        crc64nvme=detail.crc64nvme,
        modified_ns=modified_ns,
        owner=owner,
        durability=_DURABILITIES[durability],
        settled=settled == 1,
        codec=codec,
        delete_marker=delete_marker == 1,
        checksums=detail.checksums,
        checksum_type=detail.checksum_type,
        headers=detail.headers,
        metadata=detail.metadata,
        extents=decode_extents(extents),
        parts=() if parts is None else decode_parts(parts),
        ledger=None if ledger is None else decode_ledger(ledger),
        geometry=detail.geometry,
        epochs=detail.epochs,
        raw=detail.raw,
        attributes=detail.attributes,
        retention=detail.retention,
        legal_hold=detail.legal_hold,
        appends=detail.appends,
        mirror=detail.mirror,
        archive=None if path is None else ArchiveCopy(target, path, unsigned(crc), verified_ns),
        drain_attempts=attempts,
        drain_error=error,
    )


def detail_of(record: ObjectRecord) -> Detail:
    return Detail(
        record.crc64nvme,
        record.checksums,
        record.checksum_type,
        record.headers,
        record.metadata,
        record.geometry,
        record.epochs,
        record.raw,
        record.attributes,
        record.retention,
        record.legal_hold,
        record.appends,
        record.mirror,
    )


def object_row(record: ObjectRecord, due_ns: int, published_path: str | None) -> Row:
    """Parameters of ``statements.INSERT_OBJECT``, in the columns' order, for a version that was just committed."""
    return (
        record.sequence,
        record.bucket,
        record.key,
        record.version_id,
        record.object_id,
        0 if record.delete_marker else 1,  # visible
        1 if record.delete_marker else 0,
        record.state.value,
        1 if record.settled else 0,
        record.durability.value,
        record.owner,
        record.codec,
        record.length,
        record.stored_length,
        record.etag,
        record.modified_ns,
        record.modified_ns,  # stored_ns
        due_ns,
        *(0, 0, 0, "", 0),  # no lease, no drain attempt, no recall
        *(None, None, None, None),  # no archive copy
        published_path,
        encode(detail_of(record)),
        None if record.ledger is None else encode(record.ledger),
        encode(record.extents),
        encode(record.parts) if record.parts else None,
        places.node_of(record.extents),
        record.mirror[0].node if record.mirror else None,
        0,  # recall_node
    )


def all_records(rows: Iterable[Row]) -> list[ObjectRecord]:
    return [object_record(row) for row in rows]


def reservation_uses(found: Iterable[Row]) -> list[ReservationUse]:
    """Rows of (record, node or None, used bytes) as one value for each reservation, in the order they begin."""
    uses: dict[bytes, ReservationUse] = {}
    for blob, node, used_bytes in found:
        use = uses.setdefault(blob, ReservationUse(decode_reservation(blob), {}))
        if node is not None:
            use.used_bytes[node] = used_bytes
    return sorted(uses.values(), key=lambda use: (use.reservation.from_ns, use.reservation.reservation_id))
