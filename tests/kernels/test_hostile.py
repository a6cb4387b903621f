"""Hostile kernels: each goes past the gate straight into the sandbox, which must hold by itself.

``Kernel`` values are made here without ``admit``, so the process runs arbitrary Python and arbitrary machine code. What is
proved for each: the attempt fails, the gateway gets one clear error, nothing of the process is left, and the next sandbox
works. The gate refuses the same sources, which is tested too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import hashlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.ports import KernelRefused
from kernels.contract import KEEP, STOP, ArraySpec, Kernel, OutSpec, RowsSpec, Stage, StateSpec
from kernels.gate import admit
from kernels.sandbox import Batch, Sandbox, SandboxFailed, SandboxLimits
from kernels.wire import NO_VERDICT

HEAD = "def frame(frame, params, state, index, out, feedback):\n"
HARMLESS = HEAD + "    return 1\n"
LIMITS = SandboxLimits(compile_timeout_s=20.0, batch_timeout_s=5.0, frame_timeout_s=0.0, populate=False)
SHORT = SandboxLimits(compile_timeout_s=0.5, batch_timeout_s=0.1, frame_timeout_s=0.0, populate=False)
FRAME = np.full((8, 8), 3, "<u2")

WHOLE: dict[str, Any] = {
    "arrays": (ArraySpec("mask", "uint8", (8,)),),
    "out": OutSpec("uint8", (4,)),
    "rows": RowsSpec((("x", "int64"),), 2),
    "has_finish": True,
}
"""Declares everything that a kernel may have."""
FINISH = "\n\ndef finish(state, params):\n    state.a[1] = 5\n"

Launch = Callable[..., Awaitable[Sandbox]]


def children_of_zygote(path: str) -> list[int]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.connect(path)
        pid = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
async def launch(zygote_socket: str, region: Any, until: Callable[..., Any]) -> AsyncIterator[Launch]:
    """Start a source that no gate has seen. Afterwards: the input is untouched, no process or descriptor is left, and
    the zygote still serves."""
    before = len(os.listdir("/proc/self/fd"))
    region.maps[0][: FRAME.nbytes * 8] = np.broadcast_to(FRAME, (8, 8, 8)).tobytes()

    async def begin(
        source: str,
        limits: SandboxLimits = LIMITS,
        path: str = zygote_socket,
        region_fds: Sequence[int] = (),
        *,
        whole: bool = False,
    ) -> Sandbox:
        kernel = Kernel(
            name="hostile",
            source=source,
            sha256=hashlib.sha256(source.encode()).hexdigest(),
            params=(),
            state=(StateSpec("a", "int64", (4,), "sum"),),
        )
        if whole:
            kernel = dataclasses.replace(kernel, **WHOLE)
        return await Sandbox.start(
            path,
            [Stage(kernel, arrays={"mask": np.ones(8, np.uint8)} if whole else {})],
            dtype="<u2",
            shape=(8, 8),
            region_fds=region_fds or region.region_fds,
            region_bytes=region.region_bytes,
            slots=2,
            limits=limits,
        )

    yield begin
    assert bytes(region.maps[0][: FRAME.nbytes * 8]) == np.broadcast_to(FRAME, (8, 8, 8)).tobytes()
    await until(lambda: not children_of_zygote(zygote_socket))
    assert len(os.listdir("/proc/self/fd")) <= before


async def judge(sandbox: Sandbox, count: int = 2) -> Any:
    return await sandbox.run(Batch(0, 0, FRAME.nbytes, 0, count, 0))


async def twice(sandbox: Sandbox) -> None:
    """Some lies show in the next batch only."""
    await judge(sandbox)
    await judge(sandbox)


def raw(number: int, *arguments: str) -> str:
    """A module that makes a system call by number, whatever Python thinks of it."""
    return f"import ctypes\nctypes.CDLL(None).syscall({', '.join([str(number), *arguments])})\n" + HARMLESS


FORBIDDEN = {
    "UDP socket": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n" + HARMLESS,
    "TCP socket": raw(41, "2", "1", "0"),
    "unix socket": raw(41, "1", "1", "0"),
    "socketpair": "import socket\nsocket.socketpair()\n" + HARMLESS,
    "connect on the channel": raw(42, "3", "0", "0"),
    "send descriptors": raw(46, "3", "0", "0"),
    "receive descriptors": raw(47, "3", "0", "0"),
    "fork": "import os\nos.fork()\n" + HARMLESS,
    "vfork": raw(58),
    "clone3": raw(435, "0", "0"),
    "thread": "import threading\nthreading.Thread(target=print).start()\n" + HARMLESS,
    "execve": "import os\nos.execv('/bin/sh', ['sh'])\n" + HARMLESS,
    "kill the parent": "import os\nos.kill(os.getppid(), 9)\n" + HARMLESS,
    "kill everything": raw(62, "-1", "9"),
    "pidfd_open": raw(434, "1", "0"),
    "tgkill": raw(234, "1", "1", "9"),
    "ptrace": raw(101, "16", "1", "0", "0"),
    "process_vm_readv": raw(310, "1", "0", "0", "0", "0", "0"),
    "prlimit64": raw(302, "0", "9", "0", "0"),
    "setrlimit": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n" + HARMLESS,
    "prctl": raw(157, "4", "1", "0", "0", "0"),
    "setuid": raw(105, "0"),
    "unshare": raw(272, "0x10000000"),
    "setns": raw(308, "3", "0"),
    "mount": raw(165, "0", "0", "0", "0", "0"),
    "chroot": raw(161, "0"),
    "memfd_create": raw(319, "b'x'", "0"),
    "io_uring_setup": raw(425, "8", "0"),
    "bpf": raw(321, "0", "0", "0"),
    "perf_event_open": raw(298, "0", "0", "0", "0", "0"),
    "userfaultfd": raw(323, "0"),
    "keyctl": raw(250, "0", "0"),
    "shmget": raw(29, "0", "4096", "0"),
    "open, the old call": raw(2, "b'/etc/passwd'", "0"),
    "openat2": raw(437, "-100", "b'/etc/passwd'", "0", "0"),
    "unlink": raw(87, "b'/tmp/x'"),
    "name_to_handle_at": raw(303, "-100", "b'/'", "0", "0", "0"),
    "close the channel": raw(3, "3"),
    "dup": raw(32, "3"),
    "fcntl": raw(72, "3", "0", "0"),
    "signal handler": "import signal\nsignal.signal(signal.SIGSYS, signal.SIG_IGN)\n" + HARMLESS,
    "alarm": raw(37, "1"),
    "sleep": "import time\ntime.sleep(0.01)\n" + HARMLESS,
    "reboot": raw(169, "0", "0", "0", "0"),
    "module": raw(313, "3", "b''", "0"),
    "x32 getpid": raw(0x40000000 + 39),
    "unknown number": raw(4095),
    "executable mapping": (
        "import mmap\nmmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_EXEC)\n"
        + HARMLESS
    ),
    "mapping of a descriptor": raw(9, "0", "4096", "1", "1", "3", "0"),
    "writable and executable": (
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096)\na = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "ctypes.CDLL(None).mprotect(ctypes.c_void_p(a), 4096, 7)\n" + HARMLESS
    ),
    "seccomp listener": raw(317, "1", "8", "0"),
    "seccomp strict": raw(317, "0", "0", "0"),
}


@pytest.mark.parametrize("source", FORBIDDEN.values(), ids=FORBIDDEN)
async def test_forbidden_system_calls_end_the_process(launch: Launch, source: str) -> None:
    with pytest.raises(SandboxFailed) as caught:
        await launch(source)
    assert caught.value.kind == "crash"
    assert caught.value.message == "while compiling, it made a forbidden system call"


@pytest.mark.parametrize("name", ["UDP socket", "fork", "kill the parent", "executable mapping", "x32 getpid"])
async def test_the_same_without_privilege(launch: Launch, unprivileged_zygote_socket: str, name: str) -> None:
    with pytest.raises(SandboxFailed, match="forbidden system call"):
        await launch(FORBIDDEN[name], path=unprivileged_zygote_socket)
    sandbox = await launch(HARMLESS, path=unprivileged_zygote_socket)
    assert (await judge(sandbox)).verdicts.tolist() == [KEEP, KEEP]
    await sandbox.close()


DENIED = {
    "read a file": ("import os\nos.open('/etc/passwd', os.O_RDONLY)\n", "PermissionError"),
    "write a file": ("open('/tmp/hostile', 'w')\n", "PermissionError"),
    "list a folder": ("import os\nos.open('/', os.O_RDONLY | os.O_DIRECTORY)\n", "PermissionError"),
    "read its own memory file": ("open('/proc/self/mem')\n", "PermissionError"),
    "stat": ("import os\nos.stat('/etc')\n", "PermissionError"),
    "import from disk": ("import ftplib\n", "ModuleNotFoundError"),
    "large array": ("np.ones(1 << 31)\n", "MemoryError"),
    "many arrays": ("kept = []\nwhile True:\n    kept.append(bytearray(1 << 20))\n", "MemoryError"),
    "recursion in Python": ("def f():\n    return f()\n\n\nf()\n", "RecursionError"),
    "exit": ("raise SystemExit(0)\n", None),
    "exit at once": ("import os\nos._exit(0)\n", None),
    "large integer": ("x = 1 << (1 << 34)\n", "MemoryError"),
}


@pytest.mark.parametrize(("lines", "error"), DENIED.values(), ids=DENIED)
async def test_denied_at_load(launch: Launch, lines: str, error: str | None) -> None:
    with pytest.raises((KernelRefused, SandboxFailed)) as caught:
        await launch(lines + HARMLESS)
    if error is None:
        assert isinstance(caught.value, SandboxFailed)
        assert caught.value.kind == "crash"
    else:
        assert isinstance(caught.value, KernelRefused)
        assert error in caught.value.reason


async def test_endless_loop_at_load(launch: Launch) -> None:
    began = time.monotonic()
    with pytest.raises(SandboxFailed, match=r"not compiled within 0\.5 s") as caught:
        await launch("while True:\n    pass\n" + HARMLESS, SHORT)
    assert caught.value.kind == "timeout"
    assert time.monotonic() - began < 5.0


# A pointer to the region's mapping, found through the interpreter's own bookkeeping.
FIND_INPUT = """
import ctypes, gc, mmap
import numpy as np
maps = [m for m in gc.get_objects() if isinstance(m, mmap.mmap)] or [
    m for o in gc.get_objects() if isinstance(o, list) for m in o if isinstance(m, mmap.mmap)
]
addresses = [np.frombuffer(m, np.uint8).ctypes.data for m in maps if memoryview(m).readonly]
assert addresses
libc = ctypes.CDLL(None)
"""


@pytest.fixture(params=["sealed", "read-only descriptor"])
def input_fds(request: pytest.FixtureRequest, region: Any) -> Iterator[list[int]]:
    """Both ways in which memory that others may write is handed to a sandbox."""
    if request.param == "sealed":
        yield region.region_fds
        return
    fd = os.memfd_create("region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, region.region_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    yield [read_only]
    os.close(read_only)
    os.close(fd)


async def test_the_input_cannot_be_written(launch: Launch, input_fds: list[int]) -> None:
    with pytest.raises(SandboxFailed, match="memory that is not its own"):
        await launch(FIND_INPUT + "ctypes.memset(addresses[0], 0, 4096)\n" + HARMLESS, region_fds=input_fds)


async def test_the_input_cannot_be_made_writable(launch: Launch, input_fds: list[int]) -> None:
    attempt = "assert libc.mprotect(ctypes.c_void_p(addresses[0]), 4096, 3) == 0, 'still read-only'\n"
    with pytest.raises(KernelRefused, match="still read-only"):
        await launch(FIND_INPUT + attempt + HARMLESS, region_fds=input_fds)


RUNNING = {
    "as_strided far out of bounds": (
        "    far = np.lib.stride_tricks.as_strided(frame, (2, 2), (1 << 40, 2))\n    return 1 if far[1, 0] > 0 else 0\n",
        "memory that is not its own",
    ),
    "as_strided write to the state's neighbourhood": (
        "    far = np.lib.stride_tricks.as_strided(state.a, (2,), (1 << 40,))\n    far[1] = 7\n    return 1\n",
        "memory that is not its own",
    ),
    "index out of bounds": ("    return 1 if frame[index + 8, 0] > 0 else 0\n", "frame 0: hostile.py:3: IndexError"),
    "large array": ("    return 1 if np.zeros(1 << 34).sum() > 0 else 0\n", "frame 0: MemoryError"),
}


@pytest.mark.parametrize(("body", "ending"), RUNNING.values(), ids=RUNNING)
async def test_hostile_frames(launch: Launch, body: str, ending: str) -> None:
    sandbox = await launch("import numpy as np\n" + HEAD + body)
    with pytest.raises(SandboxFailed) as caught:
        await judge(sandbox)
    assert caught.value.kind == "crash"
    assert ending in caught.value.message
    assert not sandbox.alive


async def test_endless_loop_in_a_frame(launch: Launch) -> None:
    body = "    while state.a[0] >= 0:\n        state.a[0] = (state.a[0] + 1) % 1000\n    return 1\n"
    limits = SandboxLimits(batch_timeout_s=0.1, frame_timeout_s=0.0, populate=False)
    sandbox = await launch(HEAD + body, limits)
    began = time.monotonic()
    with pytest.raises(SandboxFailed) as caught:
        await judge(sandbox)
    assert caught.value.kind == "timeout"
    assert time.monotonic() - began < 2.0


async def test_deep_recursion_in_machine_code(launch: Launch) -> None:
    source = (
        "import sys\nsys.setrecursionlimit(1 << 30)\nnested = []\nfor n in range(1 << 20):\n    nested = [nested]\n"
        "repr(nested)\n" + HARMLESS
    )
    with pytest.raises(SandboxFailed, match="recursed too deeply"):
        await launch(source)


CALLED_FROM_A_FRAME = {
    "socket": ("libc.socket", ["c_int"] * 3, "2, 2, 0"),
    "fork": ("libc.fork", [], ""),
    "kill": ("libc.kill", ["c_int"] * 2, "1, 9"),
    "close": ("libc.close", ["c_int"], "3"),
}


@pytest.mark.parametrize(("function", "types", "arguments"), CALLED_FROM_A_FRAME.values(), ids=CALLED_FROM_A_FRAME)
async def test_c_functions_called_from_a_frame(launch: Launch, function: str, types: list[str], arguments: str) -> None:
    source = (
        f"import ctypes\nlibc = ctypes.CDLL(None)\ncalled = {function}\ncalled.restype = ctypes.c_int\n"
        f"called.argtypes = [{', '.join('ctypes.' + name for name in types)}]\n"
        + HEAD
        + f"    return 1 if called({arguments}) >= 0 else 0\n"
    )
    sandbox = await launch(source)
    with pytest.raises(SandboxFailed, match="forbidden system call"):
        await judge(sandbox)


async def test_a_late_compilation_cannot_make_code(launch: Launch) -> None:
    """After the second filter nothing becomes executable: not even numba's own new specialisation."""
    source = (
        "import kernels.session as session, numba\n"
        "def wake(run):\n    numba.njit(lambda x: x + 1)(1.5)\n"
        "session.Session._judge = lambda self, frames, run, start: wake(run)\n" + HARMLESS
    )
    sandbox = await launch(source)
    with pytest.raises(SandboxFailed, match="forbidden system call"):
        await judge(sandbox)


# A real peer that lies: the module rewrites the sandbox's own loop before it starts.
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


FINISH_ENDS = {
    "it makes a forbidden call": ("    called(2, 2, 0)\n", "forbidden system call"),
    "it touches foreign memory": (
        "    np.lib.stride_tricks.as_strided(state.a, (2,), (1 << 40,))[1] = 7\n",
        "memory that is not its own",
    ),
    "it exits": ("    leave(0)\n", "it exited with status 0"),
}


@pytest.mark.parametrize(("body", "ending"), FINISH_ENDS.values(), ids=FINISH_ENDS)
async def test_hostile_finish(launch: Launch, body: str, ending: str) -> None:
    functions = (
        "import ctypes\nimport numpy as np\nlibc = ctypes.CDLL(None)\ncalled, leave = libc.socket, libc._exit\n"
        "called.restype = ctypes.c_int\ncalled.argtypes = [ctypes.c_int] * 3\n"
        "leave.restype = None\nleave.argtypes = [ctypes.c_int]\n"
    )
    sandbox = await launch(functions + HARMLESS + "\n\ndef finish(state, params):\n" + body, whole=True)
    with pytest.raises(SandboxFailed, match=ending) as caught:
        await sandbox.finish({"a": np.zeros(4, np.int64)})
    assert caught.value.kind == "crash"
    assert not sandbox.alive


# The memory of array parameters is the only read-only mapping of 64 bytes.
FIND_ARRAYS = """
import ctypes, gc, mmap
import numpy as np
arrays = [m for o in gc.get_objects() if isinstance(o, (tuple, list)) for m in o if isinstance(m, mmap.mmap)]
arrays += [m for m in gc.get_objects() if isinstance(m, mmap.mmap)]
arrays += [m for f in gc.get_objects() if isinstance(f, dict) for m in f.values() if isinstance(m, mmap.mmap)]
import sys
depth = sys._getframe()
while depth is not None:
    arrays += [m for m in depth.f_locals.values() if isinstance(m, mmap.mmap)]
    depth = depth.f_back
address = [np.frombuffer(m, np.uint8).ctypes.data for m in arrays if len(m) == 64][0]
libc = ctypes.CDLL(None)
"""


async def test_array_parameters_cannot_be_written(launch: Launch) -> None:
    with pytest.raises(SandboxFailed, match="memory that is not its own"):
        await launch(FIND_ARRAYS + "ctypes.memset(address, 0, 8)\n" + HARMLESS + FINISH, whole=True)
    attempt = "assert libc.mprotect(ctypes.c_void_p(address), 4096, 3) == 0, 'still read-only'\n"
    with pytest.raises(KernelRefused, match="still read-only"):
        await launch(FIND_ARRAYS + attempt + HARMLESS + FINISH, whole=True)


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


async def test_one_sandbox_cannot_reach_another(launch: Launch) -> None:
    """Not its memory, not by signals, not through the zygote: two of them, one trying."""
    victim = await launch(HARMLESS)
    with pytest.raises(SandboxFailed, match="forbidden system call"):
        await launch(raw(62, str(victim.pid), "9"))
    with pytest.raises(SandboxFailed, match="forbidden system call"):
        await launch(raw(310, str(victim.pid), "0", "0", "0", "0", "0"))
    assert (await judge(victim)).verdicts.tolist() == [KEEP, KEEP]
    await victim.close()


@pytest.mark.parametrize(
    "source",
    [*FORBIDDEN.values(), *(lines + HARMLESS for lines, _ in DENIED.values()), *(LIE + lie for lie in LIES.values())],
)
def test_the_gate_refuses_them_all(source: str) -> None:
    with pytest.raises(KernelRefused):
        admit("hostile", source.encode())


@pytest.mark.parametrize("body", [body for name, (body, _) in RUNNING.items() if "strided" in name])
def test_the_gate_refuses_raw_memory(body: str) -> None:
    with pytest.raises(KernelRefused, match="as_strided"):
        admit("hostile", ("import numpy as np\n" + HEAD + body).encode())
