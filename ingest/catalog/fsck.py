"""Check of a node's truth against itself: journal, index and segments must tell the same story.

In: a data folder, of a running or a stopped node. Out: a report of everything that does not fit, each with where and what:
- the index, built again from snapshot and journal (of a node of a cluster: from the engine's checkpoint and log), against the
  index as it is;
- references of versions and parts against the extents table, overlaps, live bytes of segments;
- every live extent's segment file, generation and label; on request every byte, by CRC64NVME.
``repair`` builds the index anew from the journal (stopped node only). Bytes that are damaged cannot be repaired here: they
are named, so that they can be recalled from the archive or sent again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from awscrt.checksums import crc64nvme

from ingest import journal
from ingest.catalog import lock, migrate, recovery, rows, snapshot
from ingest.catalog.backup import NoCatalogue
from ingest.catalog.index import applied_sequence, chain_of
from ingest.catalog.schema import metadata
from ingest.catalog.statements import RECORD_COLUMNS
from ingest.cluster import identity
from ingest.errors import IngestError
from ingest.journal import JournalDamaged
from ingest.label import Label, read_label
from ingest.paths import NodePaths
from ingest.records import LABEL_BYTES, Extent, ObjectRecord, PartRecord
from ingest.segments import SegmentHeader

PROBLEMS_MAX = 1000
"""Problems named one by one; beyond that they are only counted."""
_READ_BYTES = 4 * 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    kind: str
    """journal, index, reference, overlap, accounting, segment, label or payload."""
    where: str
    detail: str


@dataclasses.dataclass(slots=True)
class FsckReport:
    applied_sequence: int = 0
    objects: int = 0
    parts: int = 0
    extents: int = 0
    live_bytes: int = 0
    payload_bytes_checked: int = 0
    idle_segments: int = 0
    """Segment files without a live extent: room, not a problem."""
    problem_count: int = 0
    problems: list[Problem] = dataclasses.field(default_factory=list)
    repaired: bool = False
    unchecked: list[str] = dataclasses.field(default_factory=list)
    """What could not be compared, and why."""

    @property
    def sound(self) -> bool:
        return self.problem_count == 0

    def add(self, kind: str, where: str, detail: str) -> None:
        self.problem_count += 1
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(Problem(kind, where, detail))


@dataclasses.dataclass(frozen=True, slots=True)
class _Holder:
    """Who holds extents: a version or an uploaded part."""

    holder: bytes
    where: str
    extents: tuple[Extent, ...]
    settled: bool
    record: ObjectRecord | PartRecord
    second: bool = False
    """These are the extents of the second copy."""


Tell = Callable[[Path, int], None]
"""Write the index as the truth tells it, up to an entry, to a file. Raises JournalDamaged, NotOfTheLog, Untold."""


class NotOfTheLog(IngestError):
    """The truth is whole, and the index is not of it; ``str()`` says where they part."""


class Untold(IngestError):
    """The truth cannot be had here; ``str()`` says why, and what to do."""


def fsck(data_dir: Path, *, repair: bool = False, payload: bool = False, tell: Tell | None = None) -> FsckReport:
    """Check; with ``payload`` read every buffered byte. With ``repair`` rebuild an index that differs, then check again.
    ``tell``: for a node of a cluster, whose journal is not in its folder.

    Raises NoCatalogue, CatalogueBusy (``repair`` on a running node), ClusterRefused, OSError.
    """
    paths = NodePaths(data_dir)
    if not paths.catalogue.exists():
        raise NoCatalogue(f"{data_dir} holds no catalogue")
    known = identity.read(paths)
    clustered = known is not None and known.joined
    node = known.node if known is not None and known.joined else 0
    told = tell or (_no_engine if clustered else functools.partial(_rebuild, paths))
    with contextlib.ExitStack() as stack:
        if repair:
            stack.callback(os.close, lock.take(paths.lock))
            stack.callback(os.close, lock.take(lock.catalogue(paths)))
        report = _check(paths, node, told, payload=payload)
        if not repair or not any(problem.kind in ("index", "reference", "accounting") for problem in report.problems):
            return report
        if clustered:
            _give_up_index(paths)
        else:
            recovery.rebuild(paths, node=0)
            report = _check(paths, node, told, payload=payload)
        report.repaired = True
        return report


def _give_up_index(paths: NodePaths) -> None:
    """A node of a cluster makes its index anew from the engine when it starts without one."""
    aside = paths.catalogue.with_name(f"damaged-{time.time_ns()}.sqlite")
    with (
        contextlib.closing(rows.connect(paths.catalogue, read_only=False)) as database,
        contextlib.suppress(sqlite3.Error),
    ):
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    paths.catalogue.rename(aside)
    snapshot.discard(paths.catalogue)
    snapshot.flush_path(paths.catalogue.parent)


def _check(paths: NodePaths, node: int, tell: Tell, *, payload: bool) -> FsckReport:
    report = FsckReport()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=paths.catalogue.parent, prefix="fsck-")))
        try:
            live = stack.enter_context(contextlib.closing(rows.connect(paths.catalogue, read_only=True)))
            report.applied_sequence = snapshot.copy_database(live, folder / "index.sqlite")
            with contextlib.closing(rows.connect(folder / "index.sqlite", read_only=False)) as copied:
                # What an earlier program left is checked as this one will open it.
                migrate.upgrade(copied, node=node)
            index = stack.enter_context(contextlib.closing(rows.connect(folder / "index.sqlite", read_only=True)))
            (verdict,) = index.execute("PRAGMA integrity_check(1)").fetchone()
            if verdict != "ok":
                report.add("index", "catalogue.sqlite", verdict)
                return report
            _check_journal(tell, index, folder / "rebuilt.sqlite", report)
            _check_references(index, report)
            _check_segments(paths, node, index, live, report, payload=payload)
        except (sqlite3.Error, TypeError) as error:
            report.add("index", "catalogue.sqlite", f"unreadable: {error}")
    return report


# -- journal against index
def _no_engine(_: Path, __: int) -> None:
    raise Untold("index against the cluster's log: needs the engine; give --catalog or HISS_CATALOG")


def _check_journal(tell: Tell, index: sqlite3.Connection, made: Path, report: FsckReport) -> None:
    try:
        tell(made, report.applied_sequence)
    except JournalDamaged as error:
        report.add("journal", "journal", str(error))
        return
    except NotOfTheLog as error:
        report.add("index", "log", str(error))
        return
    except Untold as error:
        report.unchecked.append(str(error))
        return
    with contextlib.closing(rows.connect(made, read_only=True)) as built:
        if applied_sequence(built) < report.applied_sequence:
            detail = f"the journal ends at entry {applied_sequence(built)}, the index at {report.applied_sequence}"
            report.add("journal", "journal", detail)
            return
        if chain_of(built) != chain_of(index):
            report.add("index", "log", f"entry {report.applied_sequence} is not that of the engine's log")
        for table, missing, extra in differences(index, built):
            report.add(
                "index", table, f"{missing} rows of the journal are missing, {extra} rows are not of the journal"
            )


def _rebuild(paths: NodePaths, made: Path, up_to: int) -> None:
    """The index as the oldest usable snapshot and the journals tell it. Raises JournalDamaged."""
    bases = [found for found in reversed(snapshot.available(paths.snapshots)) if found.applied <= up_to]
    failure: JournalDamaged | None = None
    # An empty journal tells nothing; after a restore the snapshot that it left is all there is.
    for base in [None, *bases] if journal.files(paths.journal) or not bases else bases:
        snapshot.discard(made)
        database = rows.connect(made, read_only=False)
        try:
            if base is not None:
                with contextlib.closing(rows.connect(base.path, read_only=True)) as source:
                    source.backup(database)
            database.execute("PRAGMA journal_mode=DELETE")
            migrate.upgrade(database, node=0)
            recovery.replay(database, paths.journal, up_to)
        except JournalDamaged as error:
            database.close()
            failure = error
        except FileNotFoundError:
            database.close()
            failure = JournalDamaged("the journal was rotated while it was read: check again")
        else:
            database.close()
            return
    raise failure or JournalDamaged("there is neither a snapshot nor a journal")


def differences(index: sqlite3.Connection, built: sqlite3.Connection) -> Iterator[tuple[str, int, int]]:
    """(table, rows only in ``built``, rows only in ``index``) for every table that differs. ``meta`` of the node apart."""
    for table in metadata.sorted_tables:
        if table.name == "meta":
            continue
        # Primary key first: rows then come in the order that comparing their first columns tells.
        keys = [f'"{column.name}"' for column in table.primary_key]
        others = [f'"{column.name}"' for column in table.columns if not column.primary_key]
        query = f'SELECT {", ".join(keys + others)} FROM "{table.name}" ORDER BY {", ".join(keys)}'
        names = [column.strip('"') for column in keys + others]

        def same(one: rows.Row, two: rows.Row, table: str = table.name, names: list[str] = names) -> bool:
            return one == two or _same_meaning(
                table, dict(zip(names, one, strict=True)), dict(zip(names, two, strict=True))
            )

        missing, extra = _diff_ordered(index.execute(query), built.execute(query), len(keys), same)
        if missing or extra:
            yield table.name, missing, extra


def _same_meaning(table: str, one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Are two rows the same once their records are read? One that an earlier program packed lacks fields that have been
    added since, and a tombstone of before there were versions does not say whose it is."""
    if table == "tombstones" and None in (one["object_id"], two["object_id"]):
        return one | {"object_id": None} == two | {"object_id": None}
    kind = f"outcomes.{one['kind']}" if table == "outcomes" else table
    try:
        for name, decode in _PACKED.get(kind, {}).items():
            for row in (one, two):
                row[name] = None if row[name] is None else decode(row[name])
    except msgspec.MsgspecError:
        return False
    return one == two


_PACKED: dict[str, dict[str, Callable[[bytes], Any]]] = {
    "buckets": {"record": rows.decode_bucket},
    "users": {"record": rows.decode_user},
    "reservations": {"record": rows.decode_reservation},
    "uploads": {"record": rows.decode_upload},
    "parts": {"record": rows.decode_part},
    "outcomes.object": {"record": rows.decode_object},
    "outcomes.part": {"record": rows.decode_part},
    "objects": {
        "detail": rows.decode_detail,
        "ledger": rows.decode_ledger,
        "extents": rows.decode_extents,
        "parts": rows.decode_parts,
    },
}


def _diff_ordered(
    left: Iterator[rows.Row], right: Iterator[rows.Row], keys: int, same: Callable[[rows.Row, rows.Row], bool]
) -> tuple[int, int]:
    missing = extra = 0
    one, two = next(left, None), next(right, None)
    while one is not None or two is not None:
        if one is not None and two is not None and one[:keys] == two[:keys] and same(one, two):
            one, two = next(left, None), next(right, None)
        elif two is None or (one is not None and one[:keys] < two[:keys]):
            extra += 1
            one = next(left, None)
        elif one is None or two[:keys] < one[:keys]:
            missing += 1
            two = next(right, None)
        else:  # the same row with other content
            missing, extra = missing + 1, extra + 1
            one, two = next(left, None), next(right, None)
    return missing, extra


# -- references and accounting
def _holders(index: sqlite3.Connection) -> Iterator[_Holder]:
    columns = ", ".join(f'"{column.name}"' for column in RECORD_COLUMNS)
    for row in index.execute(f"SELECT {columns}, parts FROM objects ORDER BY sequence"):
        record = rows.object_record(row)
        where = f"{record.bucket}/{record.key.decode('utf-8', 'replace')}"
        yield _Holder(record.object_id, where, record.extents, record.settled, record)
        if record.mirror:
            yield _Holder(record.object_id, where, record.mirror, True, record, second=True)
    for upload_id, object_id, blob in index.execute("SELECT upload_id, object_id, record FROM parts"):
        part = rows.decode_part(blob)
        where = f"upload {upload_id} part {part.number}"
        yield _Holder(object_id, where, part.extents, part.settled, part)
        if part.mirror:
            yield _Holder(object_id, where, part.mirror, True, part, second=True)


def _check_references(index: sqlite3.Connection, report: FsckReport) -> None:
    matched = 0
    for holder in _holders(index):
        report.objects += isinstance(holder.record, ObjectRecord) and not holder.second
        report.parts += isinstance(holder.record, PartRecord) and not holder.second
        for extent in holder.extents:
            if _is_held(index, extent, holder.holder):
                matched += 1
            else:
                report.add("reference", holder.where, f"its extent is not counted as live: {extent}")
        expected = holder.record.stored_length if isinstance(holder.record, ObjectRecord) else holder.record.length
        stored = sum(extent.length for extent in holder.extents)
        if holder.extents and stored != expected:
            report.add("reference", holder.where, f"its extents hold {stored} bytes of {expected}")
    for object_id, blob in index.execute("SELECT object_id, extents FROM mirrors"):
        for extent in rows.decode_extents(blob):
            if _is_held(index, extent, object_id):
                matched += 1
            else:
                report.add("reference", f"copy of {object_id.hex()}", f"its extent is not counted as live: {extent}")
    (counted,) = index.execute("SELECT COUNT(*) FROM extents").fetchone()
    if counted != matched:
        report.add(
            "reference", "extents", f"{counted - matched} extents are counted as live but nothing refers to them"
        )
    _check_accounting(index, report)


def _is_held(index: sqlite3.Connection, extent: Extent, holder: bytes) -> bool:
    row = index.execute(
        'SELECT length FROM extents WHERE (node, slot, segment, generation, "offset", holder) = (?, ?, ?, ?, ?, ?)',
        (extent.node, extent.slot, extent.segment, extent.generation, extent.offset, holder),
    ).fetchone()
    return row is not None and int(row[0]) == extent.length


def _check_accounting(index: sqlite3.Connection, report: FsckReport) -> None:
    counted: dict[tuple[int, int, int, int], tuple[int, int]] = {}
    before: Extent | None = None
    places = index.execute(
        'SELECT DISTINCT node, slot, segment, generation, "offset", length FROM extents'
        ' ORDER BY node, slot, segment, generation, "offset"'
    )
    for place in places:
        extent = Extent(*place)
        segment = place[:4]
        live_bytes, live_extents = counted.get(segment, (0, 0))
        counted[segment] = live_bytes + extent.stored_bytes, live_extents + 1
        report.extents += 1
        report.live_bytes += extent.stored_bytes
        if before is not None and _overlap(before, extent):
            report.add("overlap", _place(extent), f"it lies over the extent at {before.offset}")
        before = extent
    table = {
        row[:4]: row[4:]
        for row in index.execute("SELECT node, slot, segment, generation, live_bytes, live_extents FROM segments")
    }
    for segment in table.keys() | counted.keys():
        if table.get(segment) != counted.get(segment):
            detail = f"accounted (bytes, extents) {table.get(segment)}, counted {counted.get(segment)}"
            report.add("accounting", f"segment {segment}", detail)
    for file, generations in Counter(segment[:3] for segment in counted).items():
        if generations > 1:
            report.add("overlap", f"segment {file}", f"{generations} generations of one file have live extents")


def _overlap(before: Extent, extent: Extent) -> bool:
    same = (before.node, before.slot, before.segment) == (extent.node, extent.slot, extent.segment)
    return same and before.generation == extent.generation and before.offset + before.stored_bytes > extent.offset


def _place(extent: Extent) -> str:
    return f"slot {extent.slot} segment {extent.segment} offset {extent.offset}"


# -- segments
def _check_segments(
    paths: NodePaths,
    node: int,
    index: sqlite3.Connection,
    live_index: sqlite3.Connection,
    report: FsckReport,
    *,
    payload: bool,
) -> None:
    live = {tuple(row) for row in index.execute("SELECT slot, segment FROM segments WHERE node = ?", (node,))}
    found = {(int(path.parent.name), int(path.stem)) for path in paths.segments.glob("[0-9]*/[0-9]*.seg")}
    report.idle_segments = len(found - live)
    with _OpenSegments(paths) as segments:
        for holder in _holders(index):
            here = [extent for extent in holder.extents if extent.node == node]
            if not holder.settled or not here:
                continue  # its bytes are still in memory, or on other nodes
            problems = [problem for extent in here if (problem := _extent_fault(segments, holder, extent))]
            if payload and not problems and len(here) == len(holder.extents):
                problems += _payload_faults(segments, holder, report)
            # A running node may have freed and reused the place since the index was copied.
            if problems and all(_is_held(live_index, extent, holder.holder) for extent in holder.extents):
                for kind, detail in problems:
                    report.add(kind, holder.where, detail)


class _OpenSegments:
    """A few open segment files with their headers."""

    def __init__(self, paths: NodePaths) -> None:
        self._paths = paths
        self._open: dict[tuple[int, int], tuple[int, SegmentHeader | None]] = {}

    def __enter__(self) -> _OpenSegments:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        for fd, _ in self._open.values():
            os.close(fd)
        self._open.clear()

    def get(self, extent: Extent) -> tuple[int, SegmentHeader | None]:
        """Raises OSError."""
        place = extent.slot, extent.segment
        if place not in self._open:
            if len(self._open) >= 64:
                self._close()
            fd = os.open(self._paths.segment_file(*place), os.O_RDONLY | os.O_CLOEXEC)
            self._open[place] = fd, SegmentHeader.read(fd)
        return self._open[place]


def _extent_fault(segments: _OpenSegments, holder: _Holder, extent: Extent) -> tuple[str, str] | None:
    try:
        fd, header = segments.get(extent)
        label = read_label(fd, extent.offset)
    except OSError as error:
        return "segment", f"{_place(extent)}: {error}"
    if header is None or header.generation != extent.generation:
        known = "no readable header" if header is None else f"generation {header.generation}"
        return "segment", f"{_place(extent)}: {known}, generation {extent.generation} is needed"
    fault = "no readable label" if label is None else _label_fault(label, holder, extent)
    return ("label", f"{_place(extent)}: {fault}") if fault else None


def _label_fault(label: Label, holder: _Holder, extent: Extent) -> str:
    place = (extent.node, extent.slot, extent.segment, extent.generation, extent.offset)
    if (label.node, label.slot, label.segment, label.generation, label.offset) != place:
        return f"its label belongs elsewhere: {label}"
    if label.length < extent.length:
        return f"its label says {label.length} bytes, {extent.length} are needed"
    record = holder.record
    # A linked part and an appended piece carry their own id, a copy that shares bytes the source's: then the name or
    # nothing can tell.
    if isinstance(record, PartRecord) or record.parts or record.appends or label.object_id == holder.holder:
        return ""
    if (label.bucket, label.key) == (record.bucket, record.key):
        return f"its label names another version of the key: {label.object_id.hex()}"
    return ""


def _payload_faults(segments: _OpenSegments, holder: _Holder, report: FsckReport) -> list[tuple[str, str]]:
    crc = 0
    try:
        for extent in holder.extents:
            fd, _ = segments.get(extent)
            position, end = extent.offset + LABEL_BYTES, extent.offset + LABEL_BYTES + extent.length
            while position < end:
                piece = os.pread(fd, min(_READ_BYTES, end - position), position)
                if not piece:
                    raise OSError(f"{_place(extent)} ends {end - position} bytes early")
                crc = crc64nvme(piece, crc)
                position += len(piece)
                report.payload_bytes_checked += len(piece)
    except OSError as error:
        return [("payload", str(error))]
    if crc != holder.record.crc64nvme:
        return [("payload", f"CRC64NVME {crc:016x}, committed was {holder.record.crc64nvme:016x}")]
    return []
