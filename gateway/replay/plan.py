"""What a replay is of: the kernel as the bucket has it (or a file), and which settings held when, as live products say.

In: an S3 client, ``--kernel``, ``--params``. Out: ``Settings`` (the kernel with the parameters of every epoch met so far; the
first are those of now), and for a run what its live products say. What always holds: parameters of another time are taken
only where sources and arrays were the same, as a node does when it reduces what is stored (kernels/attach.epochs_of).
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gateway.cli.kernel.source import Refused, admitted
from gateway.cli.output import CliError
from gateway.cli.s3 import S3, Fetched, Listed, Missing
from gateway.replay.ranges import CRC, Endpoint
from ingest.ports import KernelRefused
from ingest.records import FrameGeometry
from kernels.attach import KERNEL_PREFIX, Attachment, attach, chained, with_arrays
from kernels.contract import resolve_params
from kernels.formats import NotFrames
from kernels.layout.detect import PROBE_BYTES, Kind, kind_of
from kernels.layout.stored import find_layout
from kernels.lineage import ArrayUse
from kernels.offline import pieces
from kernels.offline.judging import Lost
from kernels.recorded import NotAProduct, Recorded, RecordedInput, read
from kernels.runs.names import folder, group_of
from kernels.stored import info_of
from kernels.uploads import HEADER_BYTES_MAX, BadArray, Header, values_of

PRODUCT_BYTES_MAX = 1 << 30
ARRAY_BYTES_MAX = 512 << 20
NOBODY = bytes(16)
"""Object id of what S3 does not tell the id of."""


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """What a live product says of one input."""

    object_id: bytes
    crc64nvme: int
    epochs: tuple[tuple[int, int], ...]
    """(first frame, number in ``Settings``)"""


@dataclasses.dataclass(frozen=True, slots=True)
class LiveRun:
    """``names``: of groups (as they are called here), the key of the live product."""

    members: Mapping[bytes, Member] = dataclasses.field(default_factory=dict)
    names: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


class Settings:
    """The kernel with its chain and arrays, under every set of parameters."""

    def __init__(self, now: Attachment, places: Sequence[tuple[pieces.ArrayPlace, ...]], *, fixed: bool) -> None:
        """``places``: of the arrays of each stage. ``fixed``: no other parameters than these."""
        self.attachments = [now]
        self._places = places
        self._fixed = fixed

    @property
    def now(self) -> Attachment:
        return self.attachments[0]

    def recipe(self, bucket: str) -> pieces.Recipe:
        stages = tuple(
            pieces.Stage(stage.name, stage.kernel.source, places)
            for stage, places in zip(self.now.stages, self._places, strict=True)
        )
        return pieces.Recipe(
            bucket, stages, tuple(tuple(dict(stage.params) for stage in one.stages) for one in self.attachments)
        )

    def live_run(self, s3: S3, bucket: str, run: bytes) -> LiveRun:
        """What the products of the run say, of all its groups."""
        if self._fixed:
            return LiveRun()
        members: dict[bytes, Member] = {}
        names: dict[str, bytes] = {}
        prefix = folder(self.now.name, run) + b"_run."
        for listed in s3.walk(bucket, prefix):
            try:
                recorded = read(s3.get(bucket, listed.key, most_bytes=PRODUCT_BYTES_MAX).body)
            except (NotAProduct, Missing):
                continue
            if recorded.error or not (numbers := self._numbers(recorded)):
                continue
            for one in recorded.inputs:
                epochs = tuple((first, numbers[number]) for first, number in one.epochs)
                members[one.key] = Member(_object_id(one), one.crc64nvme, epochs)
                names.setdefault(group_of(*(self.attachments[number] for _, number in epochs)), listed.key)
        return LiveRun(members, names)

    def _numbers(self, recorded: Recorded) -> list[int]:
        """The recorded settings, as numbers here; none where sources or arrays were others."""
        uses = self.now.uses
        if [(stage.name, stage.sha256) for stage in recorded.stages] != [(use.kernel, use.sha256) for use in uses]:
            return []
        numbers = []
        for number in range(recorded.settings):
            params = []
            for stage, use in zip(recorded.stages, uses, strict=True):
                arrays = stage.arrays[number] if number < len(stage.arrays) else {}
                if {name: array.crc64nvme for name, array in arrays.items()} != use.arrays:
                    return []
                params.append(stage.params[number] if number < len(stage.params) else {})
            numbers.append(self._number(params))
        return numbers

    def _number(self, params: Sequence[Mapping[str, int | float]]) -> int:
        for number, known in enumerate(self.attachments):
            if [dict(stage.params) for stage in known.stages] == [dict(one) for one in params]:
                return number
        *before, last = (
            dataclasses.replace(stage, params=dict(values)) if values else stage
            for stage, values in zip(self.now.stages, params, strict=True)
        )
        self.attachments.append(dataclasses.replace(last, before=tuple(before)))
        return len(self.attachments) - 1


def _object_id(one: RecordedInput) -> bytes:
    try:
        return bytes.fromhex(one.object_id)
    except ValueError:
        return NOBODY


# -- the kernel


def settings_of(
    s3: S3, bucket: str, kernel: str, params: Mapping[str, int | float] | None, after: str = "", name: str = ""
) -> Settings:
    """``kernel``: a file, or the name of one in the bucket. ``params`` None: as stored. ``after``, ``name``: of a file. Raises
    CliError, Refused."""
    chosen = _Chain(s3, bucket)
    path = Path(kernel)
    if path.suffix == ".py" and path.is_file():
        last = chosen.of_file(path, name, after)
    else:
        last = chosen.stored(kernel)
    if params is not None:
        try:
            values = resolve_params(last.kernel, {**last.params, **params})
        except KernelRefused as refusal:
            raise Refused.of(refusal, last.kernel.source) from None
        last = dataclasses.replace(last, params=values)
    attachment = chosen.chained(last)
    if attachment.owed:
        raise CliError(f"kernel {attachment.name}: {attachment.owed}")
    fixed = params is not None or path.is_file()
    return Settings(attachment, [chosen.places[stage.name] for stage in attachment.stages], fixed=fixed)


class _Chain:
    """Kernels of a bucket as they are stored, with their arrays."""

    def __init__(self, s3: S3, bucket: str) -> None:
        self.places: dict[str, tuple[pieces.ArrayPlace, ...]] = {}
        self._s3 = s3
        self._bucket = bucket

    def stored(self, name: str) -> Attachment:
        try:
            found = self._s3.get(self._bucket, f"_kernels/{name}.py")
        except Missing:
            known = sorted(
                listed.key.decode()[len(KERNEL_PREFIX) : -3]
                for listed in self._s3.list(self._bucket, "_kernels/", most=1000)
                if listed.key.endswith(b".py")
            )
            there = f"there are: {', '.join(known)}" if known else "it has none"
            raise CliError(
                f"s3://{self._bucket} has no kernel {name!r} ({there}); a local file is given as FILE.py"
            ) from None
        return self._attached(name, found.body, found.metadata)

    def of_file(self, path: Path, name: str, after: str) -> Attachment:
        try:
            source = path.read_bytes()
        except OSError as error:
            raise CliError(f"{path}: {error.strerror}") from None
        return self._attached(name or path.stem, source, {"after": after} if after else {})

    def chained(self, last: Attachment) -> Attachment:
        others: dict[str, Attachment] = {}
        after = last.after
        while after and after not in others:
            others[after] = self.stored(after)
            after = others[after].after
        try:
            return chained(last, others)
        except KernelRefused as refusal:
            raise CliError(str(refusal)) from None

    def _attached(self, name: str, source: bytes, metadata: Mapping[str, str]) -> Attachment:
        kernel = admitted(name, source).kernel
        try:
            attachment = attach(kernel, metadata)
        except KernelRefused as refusal:
            raise CliError(str(refusal)) from None
        arrays: dict[str, ArrayUse] = {}
        places = []
        for spec in kernel.arrays:
            key = f"_kernels/{name}/{spec.name}.npy"
            try:
                found = self._s3.get(self._bucket, key, most_bytes=ARRAY_BYTES_MAX)
            except Missing:
                continue
            arrays[spec.name] = use = _array(key, found)
            places.append(pieces.ArrayPlace(spec.name, use.key, found.etag, len(found.body), use.crc64nvme))
        self.places[name] = tuple(places)
        return with_arrays(attachment, arrays, {})


def _array(key: str, found: Fetched) -> ArrayUse:
    from awscrt import checksums

    try:
        header = Header(found.body[:HEADER_BYTES_MAX], len(found.body))
        values = values_of(np.frombuffer(bytearray(found.body), np.uint8), header)
    except BadArray as error:
        raise CliError(f"{key}: {error}") from None
    said = found.headers.get(CRC, "")
    crc = int.from_bytes(base64.b64decode(said), "big") if said else checksums.crc64nvme(found.body)
    return ArrayUse(key.encode(), NOBODY, crc, values)


# -- large objects


def plain_geometry(endpoint: Endpoint, bucket: str, listed: Listed) -> tuple[FrameGeometry, int] | None:
    """How the frames of a large object lie, and its CRC64NVME, if they lie plainly: then it may be cut between any two. Raises
    nothing for an object that cannot be read: its task says so."""
    wanted = pieces.Wanted(listed.key, listed.etag, listed.size_bytes)

    async def structure() -> NotFrames:
        return NotFrames("it is not looked for here")

    try:
        record, version = endpoint.open(bucket, wanted)

        async def fetch(offset: int, length: int) -> bytes:
            buffer = bytearray(length)
            version.read_into(memoryview(buffer), offset)
            return bytes(buffer)

        async def found() -> FrameGeometry | None:
            head = await fetch(0, min(record.length, PROBE_BYTES))
            info = info_of(record)
            kind = kind_of(memoryview(head), info.key, info.content_type, info.metadata, complete=True)
            if kind not in (Kind.RAW, Kind.NPY):
                return None
            layout = (await find_layout(info, record.length, fetch, structure)).layout
            return layout if isinstance(layout, FrameGeometry) else None

        geometry = asyncio.run(found())
    except (Lost, OSError, ValueError):
        return None
    return None if geometry is None else (geometry, record.crc64nvme)
