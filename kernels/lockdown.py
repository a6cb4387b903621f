"""What a kernel process may still do after it has given everything up: compute, read and write one socket, end.

Called once, in a freshly forked single-threaded child of the zygote, in this order: ``leave_parent`` (session, scheduling,
rlimits, namespaces, uid), ``deny_files_and_network`` (no_new_privs, Landlock), ``install_filter(COMPILE)``, and after the
compiler has run ``install_filter(RUN)``. Every step raises ``LockdownError`` when it does not take; none can be undone.

seccomp is the boundary, Landlock stands behind it, namespaces are added where the machine allows them. The filters are
allow-lists for x86-64 (numbers of linux/arch/x86/entry/syscalls/syscall_64.tbl); anything else kills the process.

References: seccomp(2), landlock(7), prctl(2), capabilities(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import platform
import resource
import signal
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.prctl.restype = ctypes.c_int

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_LAST_CAPABILITY = 63

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUTS = 0x04000000
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWUSER = 0x10000000

_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1


class LockdownError(Exception):
    """A restriction could not be applied; the process must not run a kernel."""


def _syscall(number: int, *args: int) -> int:
    """The result, or minus errno."""
    result = _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(arg) for arg in args))
    return result if result >= 0 else -ctypes.get_errno()


def _prctl(option: int, *args: int) -> int:
    padded = (*args, 0, 0, 0, 0)[:4]
    result = _libc.prctl(ctypes.c_int(option), *(ctypes.c_ulong(arg) for arg in padded))
    return result if result >= 0 else -ctypes.get_errno()


def _must(result: int, what: str) -> None:
    if result < 0:
        raise LockdownError(f"{what}: {os.strerror(-result)}")


# -- leaving the parent


@dataclasses.dataclass(frozen=True, slots=True)
class Confinement:
    """``uid``: user and group to become (None: stay). ``memory_bytes``: address space beyond what is mapped now."""

    parent_pid: int
    uid: int | None
    memory_bytes: int
    nice: int
    policy: int
    tolerant: bool = False
    """Go on without Landlock and without filters where the machine has none: the operator accepted that."""


def leave_parent(confinement: Confinement) -> None:
    """Session, scheduling, rlimits, namespaces and identity. The process dies when its parent does."""
    os.setsid()
    os.setpriority(os.PRIO_PROCESS, 0, confinement.nice)
    os.sched_setscheduler(0, confinement.policy, os.sched_param(0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    _limit_resources(confinement.memory_bytes)
    _leave_namespaces(privileged=confinement.uid is not None)
    if confinement.uid is not None:
        _become(confinement.uid)
    # A change of uid clears both of these, so they come after it (prctl(2)).
    _must(_prctl(_PR_SET_DUMPABLE, 0), "dumpable")
    die_with_parent(confinement.parent_pid)


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL when the parent's forking thread ends; raises if it has ended already."""
    _must(_prctl(_PR_SET_PDEATHSIG, signal.SIGKILL), "PDEATHSIG")
    if os.getppid() != parent_pid:
        raise LockdownError("the parent has gone")


def _limit_resources(memory_bytes: int) -> None:
    with open("/proc/self/statm") as statm:
        mapped_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: mapped_bytes + memory_bytes,
        resource.RLIMIT_STACK: 8 << 20,
        resource.RLIMIT_NOFILE: 16,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 0,
    }
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        bounded = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (bounded, bounded))


def _leave_namespaces(*, privileged: bool) -> None:
    """Opportunistic: many containers forbid unshare(2), and nothing below depends on it."""
    apart = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC
    _libc.unshare(ctypes.c_int(apart if privileged else apart | _CLONE_NEWUSER))


def _become(uid: int) -> None:
    for capability in range(_LAST_CAPABILITY + 1):
        _prctl(_PR_CAPBSET_DROP, capability)
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise LockdownError(f"becoming user {uid}: {error.strerror}") from None
    if os.getresuid() != (uid, uid, uid) or os.getresgid() != (uid, uid, uid):
        raise LockdownError(f"becoming user {uid} did not take")


# -- Landlock


def landlock_abi() -> int:
    """Version of Landlock in the running system; 0 where there is none."""
    return max(0, _syscall(_SYS_LANDLOCK_CREATE_RULESET, 0, 0, _LANDLOCK_CREATE_RULESET_VERSION))


def deny_files_and_network(*, tolerant: bool = False) -> None:
    """A Landlock domain without a single rule: no file, no TCP, no signal or abstract socket outside it."""
    _must(_prctl(_PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")
    abi = landlock_abi()
    if abi < 1 and tolerant:
        return
    if abi < 1:
        raise LockdownError("Landlock is not available")
    files = (1 << 13) - 1  # ABI 1: execute … make_sym
    files |= sum(bit for since, bit in ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15)) if abi >= since)
    attributes = struct.pack("<Q", files)
    if abi >= 4:
        attributes += struct.pack("<Q", 0b11)  # bind and connect TCP
    if abi >= 6:
        attributes += struct.pack("<Q", 0b11)  # abstract unix sockets, signals
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    ruleset = _syscall(_SYS_LANDLOCK_CREATE_RULESET, ctypes.addressof(buffer), len(attributes), 0)
    _must(ruleset, "landlock_create_ruleset")
    _must(_syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


# -- seccomp

COMPILE = "compile"
RUN = "run"

_AUDIT_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_NR = {
    "read": 0,
    "write": 1,
    "stat": 4,
    "fstat": 5,
    "lstat": 6,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "ioctl": 16,
    "mremap": 25,
    "madvise": 28,
    "getcwd": 79,
    "readlink": 89,
    "futex": 202,
    "clock_gettime": 228,
    "exit_group": 231,
    "openat": 257,
    "newfstatat": 262,
    "seccomp": 317,
    "getrandom": 318,
}
_ALLOWED = {
    # clock_gettime: only where the vDSO has no clock. mremap: realloc of large blocks; it cannot change protection.
    COMPILE: (
        "read",
        "write",
        "munmap",
        "mremap",
        "madvise",
        "brk",
        "futex",
        "getcwd",
        "clock_gettime",
        "getrandom",
        "exit_group",
    ),
    RUN: ("read", "write", "munmap", "mremap", "madvise", "brk", "clock_gettime", "getrandom", "exit_group"),
}
_DENIED = ("openat", "stat", "fstat", "lstat", "newfstatat", "readlink", "ioctl", "futex")
"""Answered EACCES instead of death: tracebacks and warnings look for source files and ask whether stderr is a terminal. A
futex is allowed while compiling (what is allowed comes first); later OpenMP in a decoder still wakes threads that it does not
have, and does not mind the answer."""

_PROT_WRITE = 2
_PROT_EXEC = 4
_MAP_ANONYMOUS = 0x20
_EACCES = 13

_LD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JEQ = 0x15
_JGE = 0x35
_JSET = 0x45
_RET = 0x06
_KILL_PROCESS = 0x80000000
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_SECCOMP_SET_MODE_FILTER = 1

_Instruction = tuple[int, int, int, int]


def _argument(index: int) -> _Instruction:
    """Load the low word of a system call's argument (struct seccomp_data)."""
    return (_LD_WORD, 0, 0, 16 + 8 * index)


def _on(name: str, body: list[_Instruction]) -> list[_Instruction]:
    """``body`` for this system call (it must return), else go on with the next rule. Reloads the number first."""
    return [(_LD_WORD, 0, 0, 0), (_JEQ, 0, len(body), _NR[name]), *body]


def _filter_program(phase: str) -> list[_Instruction]:
    kill: _Instruction = (_RET, 0, 0, _KILL_PROCESS)
    allow: _Instruction = (_RET, 0, 0, _ALLOW)
    program: list[_Instruction] = [
        (_LD_WORD, 0, 0, 4),
        (_JEQ, 1, 0, _AUDIT_ARCH_X86_64),
        kill,
        (_LD_WORD, 0, 0, 0),
        (_JGE, 0, 1, _X32_BIT),
        kill,
    ]
    for name in _ALLOWED[phase]:
        program += _on(name, [allow])
    for name in _DENIED:
        program += _on(name, [(_RET, 0, 0, _ERRNO | _EACCES)])
    program += _on(
        "mmap", [_argument(2), (_JSET, 2, 0, _PROT_EXEC), _argument(3), (_JSET, 1, 0, _MAP_ANONYMOUS), kill, allow]
    )
    if phase == COMPILE:
        both = _PROT_WRITE | _PROT_EXEC
        program += _on("mprotect", [_argument(2), (_AND, 0, 0, both), (_JEQ, 0, 1, both), kill, allow])
        program += _on(
            "seccomp",
            [_argument(0), (_JEQ, 0, 2, _SECCOMP_SET_MODE_FILTER), _argument(1), (_JEQ, 1, 0, 0), kill, allow],
        )
    else:
        program += _on("mprotect", [_argument(2), (_JSET, 0, 1, _PROT_EXEC), kill, allow])
    return [*program, kill]


def supported() -> str:
    """Why this machine cannot confine kernels; empty when it can, as far as can be told without trying."""
    if platform.machine() != "x86_64":
        return f"system call filters exist for x86_64 only, this is {platform.machine()}"
    if landlock_abi() < 1:
        return "Landlock is not available (Linux 5.13 or later, enabled at boot)"
    return ""


def install_filter(phase: str, *, tolerant: bool = False) -> None:
    """Add the allow-list of ``phase`` (COMPILE or RUN) to this process; filters add up, the strictest wins."""
    if tolerant and platform.machine() != "x86_64":
        return
    instructions = b"".join(struct.pack("<HBBI", *instruction) for instruction in _filter_program(phase))
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    # struct sock_fprog: unsigned short length, padding, pointer
    program = ctypes.create_string_buffer(struct.pack("<H6xQ", len(instructions) // 8, ctypes.addressof(buffer)), 16)
    result = _syscall(_NR["seccomp"], _SECCOMP_SET_MODE_FILTER, 0, ctypes.addressof(program))
    if not tolerant:
        _must(result, "seccomp")
