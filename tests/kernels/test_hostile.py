"""Hostile kernels: each goes past the gate straight into the sandbox, which must hold by itself.

``hostile`` makes ``Kernel`` values without ``admit``, so the process runs arbitrary Python and arbitrary machine code. What is
proved for each: the attempt fails, the gateway gets one clear error, nothing of the process is left, and the next sandbox
works. The gate refuses the same sources, which is tested too. Processes that lie in their answers: ``test_hostile_answers``.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ingest.ports import KernelRefused
from kernels.contract import KEEP
from kernels.gate import admit
from kernels.sandbox import SandboxFailed, SandboxLimits
from tests.kernels.hostile import FINISH, HARMLESS, HEAD, SHORT, Launch, judge


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


async def test_the_same_without_privilege(launch: Launch, unprivileged_zygote_socket: str) -> None:
    for name, source in FORBIDDEN.items():
        with pytest.raises(SandboxFailed) as caught:
            await launch(source, path=unprivileged_zygote_socket)
        assert caught.value.message == "while compiling, it made a forbidden system call", name
    for name, (body, ending) in RUNNING.items():
        sandbox = await launch("import numpy as np\n" + HEAD + body, path=unprivileged_zygote_socket)
        with pytest.raises(SandboxFailed) as caught:
            await judge(sandbox)
        assert ending in caught.value.message, name
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
    assert time.monotonic() - began < 20.0


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
    assert time.monotonic() - began < 15.0


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
    [*FORBIDDEN.values(), *(lines + HARMLESS for lines, _ in DENIED.values())],
)
def test_the_gate_refuses_them_all(source: str) -> None:
    with pytest.raises(KernelRefused):
        admit("hostile", source.encode())


@pytest.mark.parametrize("body", [body for name, (body, _) in RUNNING.items() if "strided" in name])
def test_the_gate_refuses_raw_memory(body: str) -> None:
    with pytest.raises(KernelRefused, match="as_strided"):
        admit("hostile", ("import numpy as np\n" + HEAD + body).encode())
