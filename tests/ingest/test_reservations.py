"""Reservations: what is free when, by hand and against a brute-force model; decided, charged and released by a real catalogue."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest import reservations
from ingest.catalog.client import CatalogClient
from ingest.errors import BadReservation, DoesNotFit, NoSuchReservation, ReservationEnded
from ingest.records import (
    CommitObject,
    CommitPart,
    CompletedPart,
    CompleteUpload,
    DeleteObject,
    Extent,
    Offer,
    PartRecord,
    Reservation,
    Share,
    UploadRecord,
)
from ingest.reservations import State

HOUR_NS = 3600 * 10**9
TB, GBPS = 10**12, 10**9 // 8
MONDAY_NS = 1_796_000_000 * 10**9 // HOUR_NS * HOUR_NS
ONE_NODE = (Offer(0, 32 * TB, 40 * GBPS),)

CommitOf = Callable[..., CommitObject]


def slot(
    bucket: str,
    capacity: int,
    rate: int,
    first_hour: float,
    last_hour: float,
    shares: tuple[Share, ...] = (),
    **more: Any,
) -> Reservation:
    from_ns, until_ns = (MONDAY_NS + int(hour * HOUR_NS) for hour in (first_hour, last_hour))
    values = {"reservation_id": secrets.token_hex(4), "owner": "root", "shares": shares} | more
    return Reservation(
        bucket=bucket, capacity_bytes=capacity, rate_bytes_per_s=rate, from_ns=from_ns, until_ns=until_ns, **values
    )


def admit(wanted: Reservation, offers: Sequence[Offer], held: Sequence[Reservation]) -> Reservation:
    return reservations.admitted(wanted, offers, held, MONDAY_NS)


# -- the arithmetic


def test_a_reservation_names_its_node_and_its_share() -> None:
    admitted = admit(slot("scan", 20 * TB, 20 * GBPS, 8, 16), ONE_NODE, [])
    assert admitted.shares == (Share(0, 20 * TB, 20 * GBPS),)


def test_as_few_nodes_as_carry_it_and_the_freest_first() -> None:
    offers = [Offer(0, 10 * TB, 40 * GBPS), Offer(1, 30 * TB, 40 * GBPS), Offer(2, 30 * TB, 10 * GBPS)]
    assert [share.node for share in admit(slot("a", 20 * TB, 20 * GBPS, 8, 16), offers, []).shares] == [1]
    shares = admit(slot("b", 36 * TB, 60 * GBPS, 8, 16), offers, []).shares
    assert [share.node for share in shares] == [0, 1]
    assert sum(share.capacity_bytes for share in shares) == 36 * TB
    assert sum(share.rate_bytes_per_s for share in shares) == 60 * GBPS


def test_a_refusal_says_what_would_fit() -> None:
    held = [admit(slot("a", 20 * TB, 20 * GBPS, 14, 16), ONE_NODE, [])]
    with pytest.raises(DoesNotFit) as refused:
        admit(slot("b", 20 * TB, 20 * GBPS, 8, 16), ONE_NODE, held)
    two, four = (reservations.when(MONDAY_NS + hour * HOUR_NS) for hour in (14, 16))
    assert str(refused.value) == (
        f"12 TB and 20 Gbps are free over the whole time; what is asked for is free until {two}; "
        f"it fits from {four} on, for as long"
    )
    # And what it says is true.
    assert admit(slot("b", 20 * TB, 20 * GBPS, 8, 14), ONE_NODE, held).shares
    assert admit(slot("b", 12 * TB, 20 * GBPS, 8, 16), ONE_NODE, held).shares
    assert admit(slot("b", 20 * TB, 20 * GBPS, 16, 24), ONE_NODE, held).shares


def test_a_slot_may_begin_where_another_ends_whatever_its_grace() -> None:
    held = [admit(slot("a", 32 * TB, 40 * GBPS, 8, 16, grace_s=3600), ONE_NODE, [])]
    assert admit(slot("b", 32 * TB, 40 * GBPS, 16, 20), ONE_NODE, held).shares


def test_a_node_that_does_not_say_its_rate_takes_any() -> None:
    offers = [Offer(0, 32 * TB, 0)]
    held = [admit(slot("a", 1 * TB, 4000 * GBPS, 8, 16), offers, [])]
    assert admit(slot("b", 1 * TB, 9000 * GBPS, 8, 16), offers, held).shares == (Share(0, 1 * TB, 9000 * GBPS),)


def test_a_bucket_has_one_slot_at_a_time() -> None:
    held = [admit(slot("a", TB, GBPS, 8, 16), ONE_NODE, [])]
    with pytest.raises(DoesNotFit, match="extend or release it"):
        admit(slot("a", TB, GBPS, 15, 17), ONE_NODE, held)
    assert admit(slot("a", TB, GBPS, 16, 17), ONE_NODE, held).shares


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (slot("a", TB, GBPS, 8, 8), "is not after"),
        (slot("a", TB, GBPS, -8, -4), "is not after"),
        (slot("a", 0, 0, 8, 16), "neither capacity nor rate"),
        (slot("a", TB, -1, 8, 16), "neither capacity nor rate"),
        (slot("a", TB, GBPS, 8, 24 * 366 * 6), "five years"),
        (slot("a", TB, GBPS, 8, 16, grace_s=-1), "a grace of"),
    ],
)
def test_what_makes_no_sense_is_refused(wanted: Reservation, why: str) -> None:
    with pytest.raises(BadReservation, match=why):
        admit(wanted, ONE_NODE, [])


def test_an_extension_is_admitted_on_its_own_nodes() -> None:
    first = admit(slot("a", 20 * TB, 20 * GBPS, 8, 12), ONE_NODE, [])
    other = admit(slot("b", 20 * TB, 20 * GBPS, 14, 16), ONE_NODE, [first])

    def extend(hour: int, offers: Sequence[Offer] = ONE_NODE) -> Reservation:
        until_ns = MONDAY_NS + hour * HOUR_NS
        return reservations.extended(first, until_ns, offers, [first, other], MONDAY_NS)

    assert extend(14).until_ns == other.from_ns
    with pytest.raises(DoesNotFit, match=f"free until {reservations.when(other.from_ns)}"):
        extend(15)
    with pytest.raises(DoesNotFit):
        extend(14, [Offer(7, 99 * TB, 0)])
    with pytest.raises(BadReservation, match="a release"):
        extend(10)
    with pytest.raises(ReservationEnded):
        reservations.extended(first, MONDAY_NS + 99 * HOUR_NS, ONE_NODE, [], MONDAY_NS + 20 * HOUR_NS)


def test_states_follow_from_the_time() -> None:
    reserved = slot("a", TB, GBPS, 8, 16, grace_s=600)

    def at(hour: float) -> int:
        return MONDAY_NS + int(hour * HOUR_NS)

    states = [reservations.state(reserved, at(hour)) for hour in (7, 8, 15.9, 16.1, 17)]
    assert states == [State.PLANNED, State.ACTIVE, State.ACTIVE, State.GRACE, State.EXPIRED]
    released = reservations.released(reserved, at(12))
    assert reservations.state(released, at(12)) is State.RELEASED
    assert reservations.released(released, at(13)) == released
    assert admit(slot("b", 32 * TB, 40 * GBPS, 12, 16), ONE_NODE, [released]).shares
    with pytest.raises(ReservationEnded):
        reservations.released(reserved, at(20))


asked = st.tuples(st.integers(0, 20), st.integers(0, 12), st.integers(0, 30), st.integers(1, 10))
nodes = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10)), min_size=1, max_size=4)


@given(nodes, st.lists(asked, max_size=12))
def test_no_node_ever_holds_more_than_it_offers(node_sizes: list[tuple[int, int]], requests: list[Any]) -> None:
    """Hours and whole units, so that a model can look at every moment."""
    offers = [Offer(node, capacity, rate) for node, (capacity, rate) in enumerate(node_sizes)]
    held: list[Reservation] = []
    for number, (capacity, rate, start, length) in enumerate(requests):
        admitted: Reservation | None
        wanted = slot(f"b{number}", capacity, rate, start, start + length)
        hours = range(start, start + length)
        free = [_free(offer, held, hours) for offer in offers]
        fits = sum(one[0] for one in free) >= capacity and sum(one[1] for one in free) >= rate
        try:
            admitted = admit(wanted, offers, held)
        except BadReservation:
            assert capacity + rate == 0
            continue
        except DoesNotFit:
            admitted = None
        assert fits == (admitted is not None)
        if admitted is None:
            continue
        assert sum(share.capacity_bytes for share in admitted.shares) == capacity
        assert sum(share.rate_bytes_per_s for share in admitted.shares) == rate
        held.append(admitted)
    for offer in offers:
        left = _free(offer, held, range(0, 45))
        assert min(left) >= 0


def _free(offer: Offer, held: Sequence[Reservation], hours: range) -> tuple[int, int]:
    """Least capacity and least rate left in any of the hours."""
    left = []
    for hour in hours:
        at_ns = MONDAY_NS + hour * HOUR_NS
        shares = [
            share
            for one in held
            if one.from_ns <= at_ns < one.until_ns
            for share in one.shares
            if share.node == offer.node
        ]
        rate = offer.rate_bytes_per_s or reservations.UNLIMITED
        capacity_left = offer.buffer_bytes - sum(share.capacity_bytes for share in shares)
        left.append((capacity_left, rate - sum(share.rate_bytes_per_s for share in shares)))
    return min(one[0] for one in left), min(one[1] for one in left)


# -- the catalogue


def now_slot(client: CatalogClient, bucket: str, capacity: int = TB, rate: int = GBPS, hours: float = 1) -> Reservation:
    now_ns = client.now_ns()
    return Reservation(secrets.token_hex(8), bucket, "root", capacity, rate, now_ns, now_ns + int(hours * HOUR_NS))


async def used(client: CatalogClient, reservation: Reservation) -> int:
    return sum((await client.reservation(reservation.reservation_id)).used_bytes.values())


async def test_what_is_admitted_at_once_never_exceeds_what_there_is(client: CatalogClient) -> None:
    for number in range(12):
        await client.create_bucket(f"scan{number}", "root")
    asking = [client.reserve(now_slot(client, f"scan{number}", 10 * TB), ONE_NODE) for number in range(12)]
    answers = await asyncio.gather(*asking, return_exceptions=True)
    admitted = [answer for answer in answers if isinstance(answer, Reservation)]
    assert len(admitted) == 3
    assert all(isinstance(answer, DoesNotFit) for answer in answers if answer not in admitted)
    listed = await client.reservations(client.now_ns())
    assert {use.reservation.reservation_id for use in listed} == {one.reservation_id for one in admitted}


async def test_asked_for_twice_is_reserved_once(client: CatalogClient) -> None:
    await client.create_bucket("scan", "root")
    wanted = now_slot(client, "scan", 20 * TB)
    first = await client.reserve(wanted, ONE_NODE)
    assert await client.reserve(wanted, ONE_NODE) == first
    longer = await client.extend_reservation(first.reservation_id, first.until_ns + HOUR_NS, ONE_NODE)
    assert longer.until_ns == first.until_ns + HOUR_NS
    released = await client.release_reservation(first.reservation_id)
    assert released.released_ns
    assert await client.release_reservation(first.reservation_id) == released
    assert await client.reserve(now_slot(client, "scan", 20 * TB), ONE_NODE) != first
    with pytest.raises(NoSuchReservation):
        await client.release_reservation("nobody's")


async def test_a_reservation_changes_the_generation(client: CatalogClient) -> None:
    await client.create_bucket("scan", "root")
    before = client.generation()
    await client.reserve(now_slot(client, "scan"), ONE_NODE)
    assert client.generation() != before


async def test_what_is_used_follows_the_bytes(client: CatalogClient, commit_of: CommitOf) -> None:
    await client.create_bucket("scan", "root")
    await client.create_bucket("other", "root")
    await client.commit(commit_of("scan", b"before", length=5000))
    reserved = await client.reserve(now_slot(client, "scan"), ONE_NODE)
    one = commit_of("scan", b"one", length=5000)
    record = await client.commit(one)
    await client.commit(commit_of("other", b"one", length=5000))
    assert await used(client, reserved) == one.extents[0].stored_bytes == 12288
    # A copy shares the bytes: they are charged until the last of both has gone.
    copy = commit_of("scan", b"copy", length=5000, extents=one.extents, source=record.object_id)
    await client.commit(copy)
    await client.delete([DeleteObject("scan", b"one")])
    assert await used(client, reserved) == 12288
    await client.delete([DeleteObject("scan", b"copy")])
    assert await used(client, reserved) == 0
    # Replaced, moved, and after its time.
    await client.commit(commit_of("scan", b"two", length=1))
    last = await client.commit(commit_of("scan", b"two", length=9000))
    assert await used(client, reserved) == 4096 + 12288
    moved = Extent(0, 0, 900, 1, 0, 9000)
    await client.relocate(last.object_id, last.extents[0], [moved])
    assert await used(client, reserved) == 4096 + 12288
    await client.release_reservation(reserved.reservation_id)
    await client.commit(commit_of("scan", b"after", length=5000))
    assert await used(client, reserved) == 4096 + 12288
    await client.delete([DeleteObject("scan", b"two")])
    assert await used(client, reserved) == 0


async def test_parts_are_charged_from_their_own_commit_on(client: CatalogClient) -> None:
    await client.create_bucket("scan", "root")
    reserved = await client.reserve(now_slot(client, "scan"), ONE_NODE)
    upload = UploadRecord("scan", b"big", "u1", "root", client.now_ns())
    await client.create_upload(upload)
    for number in (1, 2, 3):
        extent = Extent(0, 0, 500 + number, 1, 0, 4096)
        part = PartRecord(number, 4096, f"e{number}", number, extents=(extent,))
        await client.commit_part(CommitPart("scan", b"big", "u1", part, secrets.token_bytes(16)))
    assert await used(client, reserved) == 3 * 8192
    named = tuple(CompletedPart(number, f"e{number}") for number in (1, 2))
    done = CompleteUpload("scan", b"big", "u1", secrets.token_bytes(16), named, "etag", 7, 8192)
    await client.complete_upload(done)
    assert await used(client, reserved) == 2 * 8192
    await client.delete([DeleteObject("scan", b"big")])
    assert await used(client, reserved) == 0


async def test_a_bucket_takes_its_reservations_with_it(client: CatalogClient) -> None:
    await client.create_bucket("scan", "root")
    reserved = await client.reserve(now_slot(client, "scan", 32 * TB), ONE_NODE)
    await client.delete_bucket("scan")
    with pytest.raises(NoSuchReservation):
        await client.reservation(reserved.reservation_id)
    await client.create_bucket("next", "root")
    assert (await client.reserve(now_slot(client, "next", 32 * TB), ONE_NODE)).shares


async def test_a_rebuilt_index_knows_reservations_and_their_use(paths: Any, serving: Any, commit_of: CommitOf) -> None:
    async with serving(), CatalogClient(paths, slot=0) as client:
        await client.create_bucket("scan", "root")
        reserved = await client.reserve(now_slot(client, "scan"), ONE_NODE)
        await client.commit(commit_of("scan", b"one", length=5000))
        before = await client.reservation(reserved.reservation_id)
    for path in paths.catalogue.parent.glob("catalogue.sqlite*"):
        path.unlink()
    async with serving(), CatalogClient(paths, slot=0) as client:
        assert await client.reservation(reserved.reservation_id) == before


def test_records_of_today_are_read_tomorrow() -> None:
    encoded = msgspec.msgpack.encode(slot("a", TB, GBPS, 8, 16, shares=(Share(0, TB, GBPS),)))
    assert msgspec.msgpack.decode(encoded, type=Reservation).shares == (Share(0, TB, GBPS),)
