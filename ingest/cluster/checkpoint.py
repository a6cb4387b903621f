"""Copies of the index in the engine: what a new node, or one that was away for long, begins with; behind the newest but one
the log may be shortened.

In: a consistent copy of a node's index. Out: rows of compressed pieces with their digests, and back. What always holds: a
checkpoint counts once it is complete; publishing is resumable (pieces that are there already are not sent again) and what is
taken is verified, piece by piece and as a whole.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy as sa
import zstandard

from ingest.catalog import snapshot
from ingest.cluster.engine import Engine
from ingest.cluster.errors import ClusterRefused
from ingest.cluster.schema import checkpoint_parts, checkpoints

PART_BYTES = 1 << 20
KEPT = 2
_READ_BYTES = 1 << 20
_LEVEL = 3

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    sequence: int
    """The last entry that it holds."""
    parts: int
    bytes: int
    """Of the database file."""
    digest: str


def _nothing(_done: int, _all: int) -> None:
    pass


async def newest(engine: Engine) -> Checkpoint | None:
    found = await complete(engine)
    return found[0] if found else None


async def complete(engine: Engine) -> list[Checkpoint]:
    """Newest first."""
    asked = (
        sa.select(checkpoints.c.sequence, checkpoints.c.parts, checkpoints.c.bytes, checkpoints.c.digest)
        .where(checkpoints.c.complete == 1)
        .order_by(checkpoints.c.sequence.desc())
    )
    async with engine.transaction() as connection:
        return [Checkpoint(*row) for row in await connection.execute(asked)]


async def publish(engine: Engine, copy: Path, sequence: int, progress: Progress = _nothing) -> Checkpoint:
    """Send a copy of the index as of ``sequence``. Raises EngineAway; called again, it goes on where it ended."""
    packed = copy.with_name(copy.name + ".zst")
    try:
        digest, parts = await asyncio.to_thread(_pack, copy, packed)
        made = Checkpoint(sequence, len(parts), os.path.getsize(copy), digest)  # noqa: ASYNC240  # of a file just written
        async with engine.transaction() as connection:
            asked = sa.select(checkpoint_parts.c.part, checkpoint_parts.c.digest)
            found = await connection.execute(asked.where(checkpoint_parts.c.sequence == sequence))
            there = dict(found.all())
        with packed.open("rb") as file:
            for part, digest_of_part in enumerate(parts):
                data = file.read(PART_BYTES)
                if there.get(part) != digest_of_part:
                    await _send(engine, sequence, part, digest_of_part, data)
                progress((part + 1) * made.bytes // len(parts), made.bytes)
        async with engine.transaction() as connection:
            await connection.execute(sa.delete(checkpoints).where(checkpoints.c.sequence == sequence))
            row = dataclasses.asdict(made) | {"complete": 1}
            await connection.execute(sa.insert(checkpoints).values(row))
            beyond = checkpoint_parts.c.part >= made.parts
            await connection.execute(sa.delete(checkpoint_parts).where(checkpoint_parts.c.sequence == sequence, beyond))
        return made
    finally:
        packed.unlink(missing_ok=True)


async def _send(engine: Engine, sequence: int, part: int, digest: str, data: bytes) -> None:
    async with engine.transaction() as connection:
        of = sa.and_(checkpoint_parts.c.sequence == sequence, checkpoint_parts.c.part == part)
        await connection.execute(sa.delete(checkpoint_parts).where(of))
        row = {"sequence": sequence, "part": part, "digest": digest, "data": data}
        await connection.execute(sa.insert(checkpoint_parts).values(row))


async def fetch(engine: Engine, wanted: Checkpoint, target: Path) -> None:
    """Write the database of a checkpoint to ``target``, on disk on return. Raises ClusterRefused for one that is damaged."""
    whole = hashlib.sha256()
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    with target.open("wb") as file:
        for part in range(wanted.parts):
            of = sa.and_(checkpoint_parts.c.sequence == wanted.sequence, checkpoint_parts.c.part == part)
            async with engine.transaction() as connection:
                row = (
                    await connection.execute(sa.select(checkpoint_parts.c.digest, checkpoint_parts.c.data).where(of))
                ).first()
            if row is None or hashlib.sha256(row[1]).hexdigest() != row[0]:
                raise ClusterRefused(f"part {part} of checkpoint {wanted.sequence} is missing or damaged in the engine")
            data = decompressor.decompress(row[1])
            whole.update(data)
            file.write(data)
    if whole.hexdigest() != wanted.digest:
        raise ClusterRefused(f"checkpoint {wanted.sequence} is damaged in the engine")
    snapshot.flush_path(target)


async def prune(engine: Engine) -> int | None:
    """Remove all but the newest complete ones; the sequence of the oldest that stays, None while fewer than KEPT are there."""
    kept = [one.sequence for one in (await complete(engine))[:KEPT]]
    if len(kept) < KEPT:
        return None
    oldest = kept[-1]
    async with engine.transaction() as connection:
        await connection.execute(sa.delete(checkpoints).where(checkpoints.c.sequence < oldest))
        await connection.execute(sa.delete(checkpoint_parts).where(checkpoint_parts.c.sequence < oldest))
    return oldest


def _pack(copy: Path, packed: Path) -> tuple[str, list[str]]:
    """SHA-256 of the database, and of each piece of its compressed form, which is the same every time."""
    whole = hashlib.sha256()
    compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj(size=copy.stat().st_size)
    with copy.open("rb") as source, packed.open("wb") as file:
        while data := source.read(_READ_BYTES):
            whole.update(data)
            file.write(compressor.compress(data))
        file.write(compressor.flush())
    return whole.hexdigest(), [hashlib.sha256(piece).hexdigest() for piece in _pieces(packed)]


def _pieces(packed: Path) -> Iterator[bytes]:
    with packed.open("rb") as file:
        while piece := file.read(PART_BYTES):
            yield piece
