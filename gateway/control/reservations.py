"""``/v1/reservations``: who gets how much of the nodes when. What is asked, the catalogue's decision, and how both look in JSON.

In: requests, the catalogue, what the nodes offer. Out: reservations as documents, times in UTC. What fits is decided by the
catalogue alone (ingest/reservations.py); ``DoesNotFit`` and its kin go through.
"""

from __future__ import annotations

import datetime
import re
import secrets
from collections.abc import Sequence
from typing import Annotated

from fastapi import HTTPException
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from gateway.control.auth import Caller
from gateway.control.paces import KernelPaces, consequence, policy_of, refusal
from gateway.settings import Settings
from ingest import reservations
from ingest.cluster.members import Member
from ingest.errors import DoesNotFit
from ingest.ports import Catalog
from ingest.records import Offer, Reservation, ReservationUse
from ingest.reservations import State
from kernels.admission import REFUSE

RESERVABLE_SHARE = 0.9
"""Of the buffer: the rest is what segments waste, and room for those who have reserved nothing."""
CALENDAR_DAYS = 28
"""How far ahead the calendar says what is free, where nothing is planned later."""
_SECOND_NS = 10**9
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _identifier(value: str) -> str:
    if value and not _ID.fullmatch(value):
        raise ValueError("letters, digits and ._- only")
    return value


def _in_reach(value: datetime.datetime) -> datetime.datetime:
    if not 2000 <= value.year <= 2200:
        raise ValueError("a time from 2000 to 2200")
    return value


_Moment = Annotated[AwareDatetime, AfterValidator(_in_reach)]
_MOST = reservations.UNLIMITED - 1


class Wanted(BaseModel):
    """A reservation to be made."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    bucket: str = Field(min_length=3, max_length=63, pattern="^[a-z0-9.-]*$")
    capacity_bytes: int = Field(0, ge=0, le=_MOST, description="Of the buffers, at any moment of the slot.")
    rate_bytes_per_s: int = Field(0, ge=0, le=_MOST)
    start: _Moment | None = Field(None, alias="from", description="With a time zone; left out: now.")
    until: _Moment
    grace_s: int = Field(300, ge=0, le=reservations.GRACE_MAX_S, description="For bodies that are late.")
    id: Annotated[str, AfterValidator(_identifier)] = Field(
        "", max_length=64, description="Of the asker's choice: the same request sent twice reserves once."
    )


class Until(BaseModel):
    model_config = ConfigDict(extra="forbid")

    until: _Moment


class OnNode(BaseModel):
    """What a reservation has on one node."""

    node: int
    capacity_bytes: int
    rate_bytes_per_s: int
    used_bytes: int


class OnKernel(BaseModel):
    """What one of the bucket's kernels takes of the slot, if it sees every frame. Null: not measured yet."""

    kernel: str
    bytes_per_s_per_core: float | None
    cores: float | None = Field(description="That it needs on a node.")
    fits: bool
    said: str


class Described(BaseModel):
    """A reservation. ``bucket`` and ``owner`` are null for those who may not read the bucket."""

    model_config = ConfigDict(populate_by_name=True)

    id: str
    bucket: str | None
    owner: str | None
    state: State
    capacity_bytes: int
    used_bytes: int
    """What lies in the buffers on its account."""
    rate_bytes_per_s: int
    start: datetime.datetime = Field(alias="from")
    until: datetime.datetime
    grace_s: int
    released: datetime.datetime | None
    nodes: list[OnNode]
    kernels: list[OnKernel] = Field([], description="Of the bucket, where a rate is reserved; not in the calendar.")


class Free(BaseModel):
    """What all nodes together have left; a rate of null: any."""

    model_config = ConfigDict(populate_by_name=True)

    start: datetime.datetime = Field(alias="from")
    until: datetime.datetime
    capacity_bytes: int
    rate_bytes_per_s: int | None


class Calendar(BaseModel):
    now: datetime.datetime
    reservations: list[Described]
    free: list[Free]


def offers_of(settings: Settings, members: Sequence[Member]) -> tuple[Offer, ...]:
    """What can be reserved: of each member that takes data, or of this node where it is alone."""
    if not members:
        return (Offer(0, int(settings.buffer_bytes * RESERVABLE_SHARE), settings.ingest_bytes_per_s),)
    return tuple(
        Offer(one.node, int(one.load.capacity_bytes * RESERVABLE_SHARE), one.load.ingest_bytes_per_s)
        for one in members
        if one.takes_bodies
    )


async def reserve(
    catalog: Catalog, offers: Sequence[Offer], caller: Caller, wanted: Wanted, paces: KernelPaces
) -> Described:
    """Raises NoSuchBucket, BadReservation, DoesNotFit."""
    reservation = Reservation(
        reservation_id=wanted.id or secrets.token_hex(6),
        bucket=wanted.bucket,
        owner=caller.user.user_id,
        capacity_bytes=wanted.capacity_bytes,
        rate_bytes_per_s=wanted.rate_bytes_per_s,
        from_ns=0 if wanted.start is None else _ns(wanted.start),
        until_ns=_ns(wanted.until),
        grace_s=wanted.grace_s,
    )
    await _refuse_slow_kernels(catalog, offers, reservation, paces)
    made = await catalog.reserve(reservation, offers)
    asked = (reservation.bucket, reservation.owner, reservation.capacity_bytes, reservation.rate_bytes_per_s)
    # Asked for in the past is asked for now; an end may have been extended since.
    times = made.from_ns == max(reservation.from_ns, made.created_ns) and made.until_ns >= reservation.until_ns
    if (made.bucket, made.owner, made.capacity_bytes, made.rate_bytes_per_s) != asked or not times:
        raise HTTPException(409, f"the id {made.reservation_id} is another reservation's")
    return await one(catalog, caller, made.reservation_id, paces)


async def _refuse_slow_kernels(
    catalog: Catalog, offers: Sequence[Offer], wanted: Reservation, paces: KernelPaces
) -> None:
    """Raises DoesNotFit where the bucket wants no slot that its kernels are too slow for, and as ``catalog.reserve``."""
    if not wanted.rate_bytes_per_s or await policy_of(catalog, wanted.bucket) != REFUSE:
        return
    held = [use.reservation for use in await catalog.reservations(catalog.now_ns())]
    if any(one.reservation_id == wanted.reservation_id for one in held):
        return  # asked for before
    planned = reservations.admitted(wanted, offers, held, catalog.now_ns())
    if reason := refusal(await paces.weighed(catalog, planned)):
        raise DoesNotFit(reason)


async def one(catalog: Catalog, caller: Caller, reservation_id: str, paces: KernelPaces) -> Described:
    """Raises NoSuchReservation."""
    use = await catalog.reservation(reservation_id)
    now_ns = catalog.now_ns()
    described = await _described(use, caller, now_ns)
    if described.bucket is not None and reservations.state(use.reservation, now_ns) in (State.PLANNED, State.ACTIVE):
        described.kernels = await _on_kernels(catalog, use.reservation, paces)
    return described


async def _on_kernels(catalog: Catalog, reservation: Reservation, paces: KernelPaces) -> list[OnKernel]:
    demands = await paces.weighed(catalog, reservation)
    if not demands:
        return []
    then = consequence(await policy_of(catalog, reservation.bucket))
    return [
        OnKernel(
            kernel=demand.kernel,
            bytes_per_s_per_core=None if demand.pace is None else demand.pace.bytes_per_s,
            cores=demand.cores,
            fits=demand.fits,
            said=demand.said if demand.fits else f"{demand.said}; {then}",
        )
        for demand in demands
    ]


async def extend(
    catalog: Catalog, offers: Sequence[Offer], caller: Caller, reservation_id: str, until: Until, paces: KernelPaces
) -> Described:
    """Raises NoSuchReservation, ReservationEnded, BadReservation, DoesNotFit."""
    await catalog.extend_reservation(reservation_id, _ns(until.until), offers)
    return await one(catalog, caller, reservation_id, paces)


async def release(catalog: Catalog, caller: Caller, reservation_id: str, paces: KernelPaces) -> Described:
    """Raises NoSuchReservation, ReservationEnded."""
    await catalog.release_reservation(reservation_id)
    return await one(catalog, caller, reservation_id, paces)


async def calendar(catalog: Catalog, offers: Sequence[Offer], caller: Caller, *, bucket: str, ended: bool) -> Calendar:
    now_ns = catalog.now_ns()
    uses = await catalog.reservations(0 if ended else now_ns)
    held = [use.reservation for use in uses]
    until_ns = max([now_ns + CALENDAR_DAYS * 86400 * _SECOND_NS, *(one.until_ns for one in held)])
    described = [await _described(use, caller, now_ns) for use in uses]
    steps = reservations.free_steps(offers, held, now_ns, until_ns)
    return Calendar(
        now=_time(now_ns),
        reservations=[one for one in described if not bucket or one.bucket == bucket],
        free=[
            Free.model_validate(
                {"from": _time(start), "until": _time(stop), "capacity_bytes": capacity, "rate_bytes_per_s": rate}
            )
            for start, stop, capacity, rate in steps
        ],
    )


async def _described(use: ReservationUse, caller: Caller, now_ns: int) -> Described:
    reservation = use.reservation
    known = caller.user.root or await caller.sight.may("s3:GetObject", reservation.bucket, b"")
    on_nodes = [
        OnNode(
            node=share.node,
            capacity_bytes=share.capacity_bytes,
            rate_bytes_per_s=share.rate_bytes_per_s,
            used_bytes=use.used_bytes.get(share.node, 0),
        )
        for share in reservation.shares
    ]
    return Described.model_validate(
        {
            "id": reservation.reservation_id,
            "bucket": reservation.bucket if known else None,
            "owner": reservation.owner if known else None,
            "state": reservations.state(reservation, now_ns),
            "capacity_bytes": reservation.capacity_bytes,
            "used_bytes": sum(use.used_bytes.values()),
            "rate_bytes_per_s": reservation.rate_bytes_per_s,
            "from": _time(reservation.from_ns),
            "until": _time(reservation.until_ns),
            "grace_s": reservation.grace_s,
            "released": _time(reservation.released_ns) if reservation.released_ns else None,
            "nodes": on_nodes,
        }
    )


def _ns(moment: datetime.datetime) -> int:
    return round(moment.timestamp() * 1000) * 1_000_000


def _time(at_ns: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at_ns / 1e9, datetime.UTC)
