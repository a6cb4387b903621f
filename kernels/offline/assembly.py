"""Products of what was judged elsewhere, put together with a node's own merge.

In: ``Judged`` versions of one run in the order of their keys, shared states of objects of one frame. Out: the bytes of
products, named as a node names them. What always holds: partial states are folded member by member in the order of the
keys (kernels/runs/merge.py), so that floating-point sums have the bits of the live ones; what an ordered kernel brought
through several objects comes behind them; only one state of a group is in memory.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from ingest.records import FrameLedger, OwedInRun, RunRecord
from kernels import product
from kernels.account import Account
from kernels.attach import Attachment
from kernels.contract import DROP, FRAME_COLUMN, KEEP, REPLACE, STOP, Kernel
from kernels.lineage import Environment, Epoch, Input, Lineage
from kernels.offline.pieces import Answer, Judged
from kernels.passes import merge_states
from kernels.rows import Rows
from kernels.runs import product as run_product
from kernels.runs.merge import fold, initial
from kernels.runs.names import group_of, product_key, run_key
from kernels.runs.partial import Member, Partial, member_of, of_version, origin_of, state_bytes
from kernels.verdicts import AFTER_STOP, UNREDUCED, Verdicts

FAILURES_NAMED = 100
Arrays = dict[str, npt.NDArray[np.generic]]
Conclude = Callable[[int, Judged, Arrays], Arrays]
"""finish() with settings of that number over a state, for frames like the object's."""
ObjectId = Callable[[Judged], bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """``key``: as a node would name it, below ``_products/``. ``source``: the object, or the run."""

    key: bytes
    body: memoryview
    source: bytes
    is_run: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Maker:
    """What all products of a replay have in common. ``settings``: the kernel with the parameters of each epoch; the first are
    those of now. ``object_id``: what is known of an input's identity."""

    bucket: str
    settings: Sequence[Attachment]
    object_id: ObjectId
    conclude: Conclude

    @property
    def kernel(self) -> Kernel:
        return self.settings[0].kernel

    def of(self, epochs: Sequence[tuple[int, int]]) -> list[Attachment]:
        return [self.settings[number] for _, number in epochs]


def arrays_of(kernel: Kernel, state: Mapping[str, bytes]) -> Arrays:
    """Copies, to be merged into."""
    return {spec.name: np.frombuffer(state[spec.name], spec.dtype).reshape(spec.shape).copy() for spec in kernel.state}


def environment_of(answer: Answer) -> Environment | None:
    return Environment(**answer.software) if answer.software else None


def of_object(maker: Maker, one: Judged, answer: Answer) -> Made:
    """The product of a version with a state of its own, or with an error that is the answer to it."""
    epochs = one.epochs
    attachments = maker.of(epochs)
    record = one.record(maker.bucket, maker.object_id(one))
    lineage = Lineage(
        kernel=maker.kernel,
        match=attachments[0].match,
        settings=tuple(attachment.settings for attachment in attachments),
        inputs=(
            Input(
                record,
                one.geometry,
                one.frames,
                tuple(Epoch(first, number) for number, (first, _) in enumerate(epochs)),
                one.layout,
            ),
        ),
        started_ns=answer.started_ns,
        ended_ns=answer.ended_ns,
        before=tuple(stage.kernel for stage in attachments[0].before),
        software=environment_of(answer),
    )
    outcome: product.Findings | str = one.error or _findings(maker.kernel, one)
    return Made(product_key(maker.kernel.name, one.key), product.build(lineage, outcome), one.key, is_run=False)


def _findings(kernel: Kernel, one: Judged) -> product.Findings:
    assert one.state is not None
    return product.Findings(
        state=arrays_of(kernel, one.state),
        verdicts=np.frombuffer(one.verdicts, np.uint8),
        ledger=_ledger(one),
        feedback_events=one.feedback_events,
        unreadable=one.unreadable,
        result=None if one.result is None else arrays_of(kernel, one.result),
        rows=_table(kernel, one),
        rows_left_out=one.rows_left_out,
    )


def _ledger(one: Judged) -> FrameLedger:
    """As this kernel alone has it: a node's counts every kernel of the bucket."""
    verdicts = Verdicts(1)
    said = np.frombuffer(one.verdicts, np.uint8)
    verdicts.record(0, 0, said[said != AFTER_STOP])
    verdicts.stop(0, int((said != AFTER_STOP).sum()), int((said == AFTER_STOP).sum()))
    account = Account(verdicts, one.frames, one.trailing_bytes, one.gaps)
    if "hiss-truncated" in one.metadata:
        account.discarded_bytes = 0
    declared = None if one.geometry is None else one.geometry.count
    return account.ledger(declared, [] if one.stopped_at is None else [one.stopped_at])


def _table(kernel: Kernel, one: Judged) -> npt.NDArray[np.void] | None:
    return None if kernel.rows is None else np.frombuffer(one.rows or b"", kernel.rows.dtype)


def joined(kernel: Kernel, parts: Sequence[Judged], epochs: tuple[tuple[int, int], ...]) -> Judged:
    """The parts of one version, in order, as one: what lies behind a STOP does not count. Only of exact kernels. Where a
    part failed, so has the whole."""
    state = initial(kernel)
    verdicts: list[npt.NDArray[np.uint8]] = []
    counted: list[Judged] = []
    for part in parts:
        if part.failure or part.error:
            return part
        said = np.frombuffer(part.verdicts, np.uint8)
        stopped = bool(counted) and counted[-1].stopped_at is not None
        verdicts.append(np.full(len(said), AFTER_STOP, np.uint8) if stopped else said)
        if not stopped:
            assert part.state is not None
            merge_states(kernel, state, arrays_of(kernel, part.state))
            counted.append(part)
    table = Rows(kernel.rows.dtype) if kernel.rows is not None else None
    for part in counted:
        if table is not None and kernel.rows is not None and part.rows:
            rows = np.frombuffer(part.rows, kernel.rows.dtype)
            table.add(int(rows[FRAME_COLUMN][0]), rows)
    return msgspec.structs.replace(
        parts[0],
        epochs=epochs,
        state=state_bytes(state),
        verdicts=b"".join(said.tobytes() for said in verdicts),
        unreadable=tuple(run for part in counted for run in part.unreadable),
        stopped_at=counted[-1].stopped_at if counted else None,
        rows=None if table is None else table.table().tobytes(),
        rows_left_out=sum(part.rows_left_out for part in counted) + (0 if table is None else table.left_out),
        feedback_events=sum(part.feedback_events for part in counted),
    )


class _Group:
    """Versions judged with the same sources, parameters and arrays, in all their epochs."""

    def __init__(self, kernel: Kernel, attachments: Sequence[Attachment]) -> None:
        self.attachments = tuple(attachments)
        self.kernel = kernel
        self.state = initial(kernel)
        self.members: list[Member] = []
        self.tables: list[tuple[bytes, npt.NDArray[np.void]]] = []
        self.sample: Judged | None = None
        """Some member: what finish() is compiled for."""
        self.started_ns = 0
        self.ended_ns = 0
        self.feedback_events = 0
        self.rows_left_out = 0
        self.software: Environment | None = None

    def take(self, one: Judged, member: Member) -> None:
        self.members.append(member)
        self.sample = self.sample or one
        self.feedback_events += one.feedback_events
        self.rows_left_out += one.rows_left_out
        if (table := _table(self.kernel, one)) is not None:
            self.tables.append((one.key, table))

    def rows(self) -> npt.NDArray[np.void] | None:
        """Ordered by key, then frame."""
        if self.kernel.rows is None:
            return None
        tables = [table for _, table in sorted(self.tables, key=lambda place: place[0])]
        return np.concatenate(tables) if tables else np.zeros(0, self.kernel.rows.dtype)


class RunAssembly:
    """One run while its members come, in the order of their keys."""

    def __init__(self, maker: Maker, run: bytes, names: Mapping[str, bytes]) -> None:
        """``names``: of groups that have a product already, its key (kernels/runs/names.run_key)."""
        self.run = run
        self.failures: list[tuple[bytes, str]] = []
        self._maker = maker
        self._names = names
        self._groups: dict[str, _Group] = {}

    def failed(self, key: bytes, reason: str) -> None:
        self.failures.append((key, reason))

    def add(self, one: Judged, answer: Answer) -> None:
        """A version with a state of its own."""
        group = self._group(self._maker.of(one.epochs), answer)
        record = one.record(self._maker.bucket, self._maker.object_id(one))
        assert one.state is not None
        epochs = tuple((first, number) for number, (first, _) in enumerate(one.epochs))
        origin = origin_of(*group.attachments)
        if one.single:
            member = self._single(one)
            partial = Partial(origin, (member,), one.state, False, answer.started_ns, answer.ended_ns)
        else:
            partial = of_version(
                record,
                self._maker.kernel,
                origin,
                state=arrays_of(self._maker.kernel, one.state),
                verdicts=np.frombuffer(one.verdicts, np.uint8),
                frames=one.frames,
                gaps=one.gaps,
                epochs=epochs,
                rows=_table(self._maker.kernel, one),
                feedback_events=one.feedback_events,
                rows_left_out=one.rows_left_out,
            )
            (member,) = partial.members
        fold(self._maker.kernel, group.state, partial)
        group.take(one, member)

    def share(self, objects: Sequence[Judged], answer: Answer) -> None:
        """Versions of one frame whose states are one, by settings, in the answer."""
        for number, state in answer.shared.items():
            group = self._group([self._maker.settings[number]], answer)
            mine = [one for one in objects if one.epochs[0][1] == number]
            members = tuple(self._single(one) for one in mine)
            origin = origin_of(*group.attachments)
            partial = Partial(origin, members, state, False, answer.started_ns, answer.ended_ns)
            fold(self._maker.kernel, group.state, partial)
            for one, member in zip(mine, members, strict=True):
                group.take(one, member)

    def _single(self, one: Judged) -> Member:
        (verdict,) = one.verdicts
        return member_of(
            one.record(self._maker.bucket, self._maker.object_id(one)),
            one.geometry,
            frames=1,
            kept=int(verdict in (KEEP, STOP)),
            dropped=int(verdict == DROP),
            replaced=int(verdict == REPLACE),
            unreduced=int(verdict == UNREDUCED),
            rows=len(table) if (table := _table(self._maker.kernel, one)) is not None else 0,
        )

    def _group(self, attachments: Sequence[Attachment], answer: Answer) -> _Group:
        name = group_of(*attachments)
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(self._maker.kernel, attachments)
        group.started_ns = min(group.started_ns or answer.started_ns, answer.started_ns)
        group.ended_ns = max(group.ended_ns, answer.ended_ns)
        group.software = group.software or environment_of(answer)
        return group

    # -- the end

    def made(self) -> Iterator[Made]:
        """The products of all groups. Raises what ``conclude`` does."""
        now_ns = time.time_ns()
        run = RunRecord(self._maker.bucket, self.run, now_ns, now_ns, "replay")
        owed = OwedInRun(0, len(self.failures), tuple(self.failures[:FAILURES_NAMED]))
        kernel = self._maker.kernel.name
        if not self._groups:
            if self.failures:
                body = run_product.build_failure(run, kernel, owed, 0)
                yield Made(run_key(kernel, self.run), body, self.run, is_run=True)
            return
        for name, group in self._groups.items():
            yield Made(self._key(name), self._body(run, owed, name, group), self.run, is_run=True)

    def _key(self, name: str) -> bytes:
        """Where the live product of the group is; else the group of now has the run's own name."""
        known, kernel = self._names.get(name), self._maker.kernel.name
        if known is not None:
            return known
        own = run_key(kernel, self.run)
        newest = group_of(self._maker.settings[0])
        if own not in self._names.values() and (name == newest or newest not in self._groups):
            return own
        return run_key(kernel, self.run, name)

    def _body(self, run: RunRecord, owed: OwedInRun, name: str, group: _Group) -> memoryview:
        result = None
        # As on a node: finish() is that of the bucket's kernel, so it is run for the group of now.
        now = name == group_of(self._maker.settings[0])
        if now and group.kernel.has_finish and group.sample is not None:
            result = self._maker.conclude(group.sample.epochs[-1][1], group.sample, group.state)
        members = sorted(group.members, key=lambda one: one.key)
        return run_product.build(
            run_product.RunFindings(
                run=run,
                kernels=tuple(stage.kernel for stage in group.attachments[0].stages),
                origin=origin_of(*group.attachments),
                group=name,
                state=group.state,
                members=members,
                count=len(members),
                elsewhere=sum(len(other.members) for other in self._groups.values()) - len(members),
                owed=owed,
                as_of=0,
                started_ns=group.started_ns,
                ended_ns=group.ended_ns,
                feedback_events=group.feedback_events,
                sums=run_product.sums_of(members),
                rows=group.rows(),
                rows_left_out=group.rows_left_out,
                result=result,
                software=group.software,
            )
        )
