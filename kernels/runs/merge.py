"""The merge of a run's partials. Pure: partials in, one state and its members out.

Exact kernels (integers, min, max, or) merge in any order, each partial once, as it comes. Floating-point sums depend on the
order, so theirs are merged anew each time, one member after the other in the order of their keys: whatever was retried,
overwritten or judged late, the same members give the same bits. An ordered kernel over objects of one frame has one state
for all of them, which is merged behind those (``kernels/offline/replay`` does the same).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from ingest.records import FrameGeometry
from kernels.contract import Kernel, merge
from kernels.runs.names import exact
from kernels.runs.partial import MEMBER_BYTES, Member, Partial, StateArrays


def initial(kernel: Kernel) -> StateArrays:
    return {spec.name: np.full(spec.shape, spec.identity, spec.dtype) for spec in kernel.state}


def fold(kernel: Kernel, into: StateArrays, partial: Partial) -> None:
    """Merge all of a partial into a state, in the order of its members. Raises BadPartial."""
    arrays = partial.arrays(kernel)
    for spec in kernel.state:
        for part in arrays[spec.name] if partial.each else (arrays[spec.name],):
            merge(spec, into[spec.name], part)


def in_key_order(kernel: Kernel, partials: Collection[Partial]) -> StateArrays:
    """Every member's own state merged by key (bytewise); then the states that an ordered kernel brought through several
    members, which can only be taken whole. Raises BadPartial."""
    total = initial(kernel)
    for arrays, number in _by_key(kernel, partials):
        for spec in kernel.state:
            merge(spec, total[spec.name], arrays[spec.name][number])
    for partial in sorted((one for one in partials if not one.each), key=lambda one: one.members[0].key):
        fold(kernel, total, partial)
    return total


def _by_key(kernel: Kernel, partials: Collection[Partial]) -> Iterator[tuple[StateArrays, int]]:
    """Of partials with a state for each member."""
    places = [
        (member.key, partial.arrays(kernel), number)
        for partial in partials
        if partial.each
        for number, member in enumerate(partial.members)
    ]
    for _, arrays, number in sorted(places, key=lambda place: place[0]):
        yield arrays, number


def join(kernel: Kernel, partials: Collection[Partial]) -> Partial:
    """One partial in the place of several of the same group, all or none of which have a state a member: members in key
    order. Raises BadPartial."""
    found = list(partials)
    order = sorted(
        ((member.key, at, number) for at, one in enumerate(found) for number, member in enumerate(one.members)),
        key=lambda place: place[0],
    )
    members = tuple(found[at].members[number] for _, at, number in order)
    state: StateArrays
    apart = all(one.each for one in found)
    if not apart:
        state = initial(kernel)
        for one in found:
            fold(kernel, state, one)
    else:
        arrays = [one.arrays(kernel) for one in found]
        state = {
            spec.name: np.stack([arrays[at][spec.name][number] for _, at, number in order]) for spec in kernel.state
        }
    return Partial(
        origin=found[0].origin,
        members=members,
        state={name: array.tobytes() for name, array in state.items()},
        each=apart,
        started_ns=min(one.started_ns for one in found),
        ended_ns=max(one.ended_ns for one in found),
        feedback_events=sum(one.feedback_events for one in found),
        rows=b"".join(table.tobytes() for table in _tables(kernel, found)),
        rows_left_out=sum(one.rows_left_out for one in found),
    )


def _tables(kernel: Kernel, partials: Collection[Partial]) -> list[npt.NDArray[np.void]]:
    """Every member's rows, in key order."""
    found: list[tuple[bytes, npt.NDArray[np.void]]] = []
    for partial in partials:
        table = partial.table(kernel)
        if table is None:
            return []
        ends = np.cumsum([member.rows for member in partial.members])
        parts = np.split(table, ends[:-1])
        found += [(member.key, part) for member, part in zip(partial.members, parts, strict=True)]
    return [table for _, table in sorted(found, key=lambda one: one[0])]


class Total:
    """The state of one group while its partials come. Keeps what merging anew would need, and no more."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._exact = exact(kernel)
        self._state = initial(kernel)
        self._partials: dict[bytes, Partial] = {}
        self.members: dict[bytes, tuple[Member, ...]] = {}
        """By partial."""
        self.started_ns = 0
        self.ended_ns = 0
        self.feedback_events = 0
        self.rows_left_out = 0
        self._rows: dict[bytes, Partial] = {}
        """Partials without their states, of kernels with rows."""

    def add(self, identity: bytes, partial: Partial) -> None:
        """Each once. Raises BadPartial; then nothing has changed."""
        if self._exact:
            partial.arrays(self.kernel)
            fold(self.kernel, self._state, partial)
        else:
            partial.arrays(self.kernel)
            self._partials[identity] = partial
        self._keep_rows(identity, partial)
        self.members[identity] = partial.members
        self.rows_left_out += partial.rows_left_out
        self.started_ns = min(self.started_ns or partial.started_ns, partial.started_ns)
        self.ended_ns = max(self.ended_ns, partial.ended_ns)
        self.feedback_events += partial.feedback_events

    def replace(self, old: Collection[bytes], new: bytes, partial: Partial) -> None:
        """The same members are in one partial now."""
        for identity in old:
            del self.members[identity]
            self._partials.pop(identity, None)
            self._rows.pop(identity, None)
        self._keep_rows(new, partial)
        self.members[new] = partial.members
        if not self._exact:
            self._partials[new] = partial

    def _keep_rows(self, identity: bytes, partial: Partial) -> None:
        if partial.table(self.kernel) is not None:
            self._rows[identity] = msgspec.structs.replace(partial, state={})

    def rows(self) -> npt.NDArray[np.void] | None:
        """Ordered by key, then frame."""
        if self.kernel.rows is None:
            return None
        tables = _tables(self.kernel, self._rows.values())
        return np.concatenate(tables) if tables else np.zeros(0, self.kernel.rows.dtype)

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        if not self._exact:
            return in_key_order(self.kernel, self._partials.values())
        return {name: array.copy() for name, array in self._state.items()}

    def geometry(self) -> FrameGeometry | None:
        """The layout of some member's frames."""
        layouts = (member.geometry for group in self.members.values() for member in group)
        return next((geometry for geometry in layouts if geometry is not None), None)

    def all_members(self) -> list[Member]:
        """In key order."""
        return sorted((member for group in self.members.values() for member in group), key=lambda one: one.key)

    @property
    def size_bytes(self) -> int:
        """Memory it takes, about."""
        members = sum(len(group) for group in self.members.values())
        kept = sum(len(data) for one in self._partials.values() for data in one.state.values())
        return (
            sum(array.nbytes for array in self._state.values())
            + MEMBER_BYTES * members
            + kept
            + sum(len(one.rows) for one in self._rows.values())
        )
