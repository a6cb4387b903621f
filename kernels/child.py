"""The life of a sandboxed process: map, lock down, then serve (kernels/session.py) until the gateway hangs up.

Entered in a fresh fork of the zygote and never left: every way out is ``os._exit``. In: descriptors of the channel, of the
output memory, of the memory of arrays and of the regions. Order matters and is the security argument: everything that needs
a right happens before it is given up, and the first line of the user's source runs after Landlock and the first filter hold.
"""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
from collections.abc import Sequence
from typing import NoReturn

from kernels import lockdown, probes, session, wire
from kernels.layout import reader
from kernels.session import CHANNEL_FD, EXIT_FAILED, EXIT_HUNG_UP
from kernels.wire import RawReply, SandboxSpec


def main(spec: SandboxSpec, fds: Sequence[int], confinement: lockdown.Confinement) -> NoReturn:
    """``fds``: channel, output memory, arrays, regions; see wire.ForkRequest."""
    try:
        channel, output_fd, *region_fds = fds
        output = mmap.mmap(output_fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        arrays = None
        if spec.arrays_bytes:
            arrays = mmap.mmap(region_fds.pop(0), spec.arrays_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        populate = mmap.MAP_POPULATE if spec.populate else 0
        regions = [mmap.mmap(fd, spec.region_bytes, mmap.MAP_SHARED | populate, mmap.PROT_READ) for fd in region_fds]
        _keep_only(channel)
        _confined(spec, confinement, memoryview(output), arrays, regions)
    except BaseException:
        os._exit(EXIT_FAILED)


def _keep_only(channel: int) -> None:
    """Descriptors 0 to 2 on /dev/null, the channel on 3, nothing else (mappings outlive theirs)."""
    aside = fcntl.fcntl(channel, fcntl.F_DUPFD, CHANNEL_FD + 1)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.dup2(aside, CHANNEL_FD)
    os.closerange(CHANNEL_FD + 1, os.sysconf("SC_OPEN_MAX"))


def _confined(
    spec: SandboxSpec,
    confinement: lockdown.Confinement,
    output: memoryview,
    arrays: mmap.mmap | None,
    regions: list[mmap.mmap],
) -> NoReturn:
    try:
        lockdown.leave_parent(confinement)
        lockdown.deny_files_and_network(tolerant=confinement.tolerant)
        if spec.probe in probes.BEFORE_FILTER:
            session.say(RawReply(wire.KIND_PROBE, text=probes.BEFORE_FILTER[spec.probe]()))
            os._exit(EXIT_HUNG_UP)
        lockdown.install_filter(lockdown.COMPILE, tolerant=confinement.tolerant)
    except lockdown.LockdownError as error:
        session.say(RawReply(wire.KIND_FAILED, text=str(error)))
        os._exit(EXIT_FAILED)
    if spec.probe:
        _probe(spec.probe, regions, tolerant=confinement.tolerant)
    if spec.reader:
        lockdown.install_filter(lockdown.RUN, tolerant=confinement.tolerant)
        session.say(RawReply(wire.KIND_READY))
        reader.serve(regions)
    served = session.Session(spec, output, arrays, regions)
    gc.collect()
    gc.freeze()
    lockdown.install_filter(lockdown.RUN, tolerant=confinement.tolerant)
    session.say(RawReply(wire.KIND_READY))
    served.serve()


def _probe(name: str, regions: list[mmap.mmap], *, tolerant: bool) -> NoReturn:
    if name in probes.RUN_FILTER:
        lockdown.install_filter(lockdown.RUN, tolerant=tolerant)
    session.say(RawReply(wire.KIND_PROBE, text=probes.UNDER_FILTER[name](regions)))
    os._exit(EXIT_HUNG_UP)
