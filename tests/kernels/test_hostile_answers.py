"""Sandboxes that lie: the module rewrites the sandbox's own loop before it starts, and every answer of it is checked.

What is proved for each: the gateway notices, says so as one ``lie`` (or believes nothing that matters), and ends the process.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from ingest.ports import KernelRefused
from kernels.contract import STOP
from kernels.gate import admit
from kernels.sandbox import Sandbox, SandboxFailed
from kernels.wire import NO_VERDICT
from tests.kernels.hostile import FINISH, HARMLESS, SHORT, Launch, judge


async def twice(sandbox: Sandbox) -> None:
    """Some lies show in the next batch only."""
    await judge(sandbox)
    await judge(sandbox)


LIE = "import dataclasses, os\nimport kernels.session as session\nfrom kernels import wire\nhonest = session.say\n"
LIES = {
    "another sequence": "session.say = lambda r: honest(dataclasses.replace(r, sequence=r.sequence + (r.kind == 2)))\n",
    "another count": "session.say = lambda r: honest(dataclasses.replace(r, index=r.index + (r.kind == 2)))\n",
    "too much feedback": "session.say = lambda r: honest(dataclasses.replace(r, feedback_count=257 * (r.kind == 2)))\n",
    "endless feedback": "session.say = lambda r: honest(dataclasses.replace(r, dropped_feedback=(1 << 63) * (r.kind == 2)))\n",
    "feedback of other frames": (
        "def say(r):\n"
        "    if r.kind == 2:\n"
        "        session.own._arguments[0][2].entries[0] = (99, 1, 1.0)\n"
        "        r = dataclasses.replace(r, feedback_count=1)\n"
        "    honest(r)\n"
        "session.say = say\n"
        "serve = session.Session.serve\n"
        "def remember(self):\n    session.own = self\n    serve(self)\n"
        "session.Session.serve = remember\n"
    ),
    "no verdicts": "session.Session._judge = lambda self, frames, run, start: run.count\n",
    "invalid verdicts": (
        "def judge(self, frames, run, start):\n    self._verdicts[:] = 7\n    return run.count\n"
        "session.Session._judge = judge\n"
    ),
    "short datagram": "session.say = lambda r: os.write(3, b'x') if r.kind == 2 else honest(r)\n",
    "long datagram": "session.say = lambda r: os.write(3, bytes(60000)) if r.kind == 2 else honest(r)\n",
    "unknown kind": "session.say = lambda r: honest(dataclasses.replace(r, kind=99 if r.kind == 2 else r.kind))\n",
    "text where none belongs": "session.say = lambda r: honest(dataclasses.replace(r, text='x' * (r.kind == 2)))\n",
    "ready again": "session.say = lambda r: honest(dataclasses.replace(r, kind=1))\n",
    "refused late": "session.say = lambda r: honest(dataclasses.replace(r, kind=3 if r.kind == 2 else r.kind))\n",
    "raised elsewhere": (
        "session.say = lambda r: honest(dataclasses.replace(r, kind=4, index=10**6) if r.kind == 2 else r)\n"
    ),
    "two answers": "session.say = lambda r: (honest(r), honest(r)) if r.kind == 2 else honest(r)\n",
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_lies_are_noticed(launch: Launch, lie: str) -> None:
    sandbox = await launch(LIE + lie + HARMLESS)
    with pytest.raises(SandboxFailed) as caught:
        await twice(sandbox)
    assert caught.value.kind == "lie"
    assert not sandbox.alive


# Then the arguments of the compiled loop are at hand: parameters, state, feedback, out.
OWN = (
    "serve = session.Session.serve\n"
    "def remember(self):\n    session.own = self\n    serve(self)\n"
    "session.Session.serve = remember\n"
)


def with_rows(*frames: int) -> str:
    """Answers every batch with rows of these frames."""
    stores = "".join(
        f"        session.own._arguments[0][2].rows[{n}] = ({frame}, 0)\n" for n, frame in enumerate(frames)
    )
    return (
        OWN
        + "def say(r):\n    if r.kind == 2:\n"
        + stores
        + f"        r = dataclasses.replace(r, row_count={len(frames)})\n"
        "    honest(r)\nsession.say = say\n"
    )


def with_verdicts(*verdicts: int, judged: int = 2) -> str:
    stores = "".join(f"    self._verdicts[{n}] = {verdict}\n" for n, verdict in enumerate(verdicts))
    return f"def judge(self, frames, run, start):\n{stores}    return {judged}\nsession.Session._judge = judge\n"


def with_reply(**changes: int) -> str:
    changed = ", ".join(f"{name}={value}" for name, value in changes.items())
    return f"session.say = lambda r: honest(dataclasses.replace(r, {changed}) if r.kind == 2 else r)\n"


WHOLE_LIES = {
    "rows of a later frame": with_rows(0, 2),
    "rows of an earlier frame": with_rows(-1, 0),
    "rows out of order": with_rows(1, 0),
    "rows out of order inside": with_rows(0, 1, 0, 1),
    "too many rows of one frame": with_rows(0, 1, 1, 1),
    "more rows than there is room": with_reply(row_count=1 << 31),
    "endless dropped rows": with_reply(dropped_rows=1 << 63),
    "fewer frames without STOP": with_verdicts(1, 1, judged=1),
    "no frame": with_verdicts(3, 1, judged=0),
    "frames after a STOP": with_verdicts(3, 1),
    "STOP twice": with_verdicts(3, 3),
    "unreadable, and nothing was encoded": with_verdicts(253, 1),
}


@pytest.mark.parametrize("lie", WHOLE_LIES.values(), ids=WHOLE_LIES)
async def test_lies_about_rows_and_verdicts(launch: Launch, lie: str) -> None:
    sandbox = await launch(LIE + lie + HARMLESS + FINISH, whole=True)
    with pytest.raises(SandboxFailed) as caught:
        await judge(sandbox)
    assert caught.value.kind == "lie"
    assert not sandbox.alive


async def test_a_replaced_frame_needs_an_out(launch: Launch) -> None:
    sandbox = await launch(LIE + with_verdicts(2, 1) + HARMLESS)
    with pytest.raises(SandboxFailed, match="an out that the kernel does not have"):
        await judge(sandbox)


async def test_verdicts_behind_a_stop_are_not_believed(launch: Launch) -> None:
    sandbox = await launch(LIE + with_verdicts(3, 1, judged=1) + HARMLESS)
    reply = await judge(sandbox)
    assert reply.verdicts.tolist() == [STOP, NO_VERDICT]
    assert reply.stopped_at == 0
    await sandbox.close()


FINISH_LIES = {
    "another sequence": with_reply(sequence=77),
    "frames": with_reply(index=1),
    "rows": with_reply(row_count=1),
    "feedback": with_reply(feedback_count=1),
    "ready": with_reply(kind=1),
    "refused": with_reply(kind=3),
    "raised by a kernel that is not there": with_reply(kind=4, stage=1),
    "raised in a frame": with_reply(kind=4, index=1),
    "short": "session.say = lambda r: os.write(3, b'x') if r.kind == 2 else honest(r)\n",
}


@pytest.mark.parametrize("lie", FINISH_LIES.values(), ids=FINISH_LIES)
async def test_lies_about_finish(launch: Launch, lie: str) -> None:
    sandbox = await launch(LIE + lie + HARMLESS + FINISH, whole=True)
    with pytest.raises(SandboxFailed) as caught:
        await sandbox.finish({"a": np.zeros(4, np.int64)})
    assert caught.value.kind == "lie"
    assert not sandbox.alive


EARLY_LIES = {
    "flood of refusals": "for n in range(100):\n    honest(wire.RawReply(3, line=1, text='no'))\n",
    "flood of cautions": "for n in range(100):\n    honest(wire.RawReply(7, line=1, text='x'))\n",
    "answers before the first batch": "honest(wire.RawReply(2, 1, 1))\n",
    "garbage": "os.write(3, b'garbage')\n",
}


@pytest.mark.parametrize("lie", EARLY_LIES.values(), ids=EARLY_LIES)
async def test_lies_before_the_first_batch(launch: Launch, lie: str) -> None:
    with pytest.raises((SandboxFailed, KernelRefused)) as caught:
        await launch(LIE + lie + HARMLESS)
    assert isinstance(caught.value, KernelRefused) or caught.value.kind == "lie"


async def test_ready_before_compiling_gains_nothing(launch: Launch) -> None:
    sandbox = await launch(LIE + "honest(wire.RawReply(1))\nwhile True:\n    pass\n" + HARMLESS, SHORT)
    with pytest.raises(SandboxFailed) as caught:
        await judge(sandbox)
    assert caught.value.kind == "timeout"


async def test_a_flood_of_answers_stays_in_the_socket(launch: Launch) -> None:
    """The gateway reads one datagram a batch; a process that sends more blocks itself."""
    source = LIE + "def say(r):\n    while True:\n        honest(r)\nsession.say = say\n" + HARMLESS
    sandbox = await launch(source)
    await asyncio.sleep(0)
    with pytest.raises(SandboxFailed, match=r"does not fit|instead of") as caught:
        await judge(sandbox)
    assert caught.value.kind == "lie"


async def test_text_for_the_scientist_is_plain(launch: Launch) -> None:
    source = LIE + "honest(wire.RawReply(3, line=1 << 31, text=chr(27) + '[2J' + chr(0) + 'x' * 5000))\nos._exit(0)\n"
    with pytest.raises(KernelRefused) as caught:
        await launch(source)
    assert caught.value.line <= source.count("\n") + 1
    assert caught.value.reason.startswith("[2Jxxx")
    assert len(caught.value.reason) <= 2000


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_the_gate_refuses_them_all(lie: str) -> None:
    with pytest.raises(KernelRefused):
        admit("hostile", (LIE + lie + HARMLESS).encode())
