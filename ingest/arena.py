"""The arena: shared memory where bodies land once, cut into regions, slabs and spans.

In: memory file descriptors that the supervisor made (``create_regions``) and handed down. Out: ``Span``s, contiguous
pieces of one region, and ``ArenaDomain``s, regions that belong to one bucket because its kernels may read them.
Always holds: a slab is in at most one span; a region that a sandbox may have mapped serves one bucket until every such
process is reaped, and is scrubbed before it serves another. One event loop owns an arena: no locks.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import logging
import mmap
import os
from collections.abc import Callable, Sequence

from ingest.counters import Counters

logger = logging.getLogger(__name__)

REGION_BYTES = 64 << 20
SLAB_BYTES = 4 << 20
SPANS_GUARANTEED = 2
"""Spans every admitted stream can count on: one to receive into, one on its way to the disk."""

_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)


def create_regions(count: int, region_bytes: int = REGION_BYTES) -> list[int]:
    """Make ``count`` memory files of a size that nobody can change any more (a mapping then never faults with SIGBUS)."""
    fds = []
    for number in range(count):
        fd = os.memfd_create(f"hiss-region-{number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(fd, 0o600)  # a sandbox under a uid of its own cannot reopen it for writing
        os.posix_fallocate(fd, 0, region_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        fds.append(fd)
    return fds


class Region:
    """One memory file, mapped writable here. ``bucket`` is the domain it belongs to, None while it is shared."""

    __slots__ = ("_free", "address", "bucket", "clean", "fd", "index", "memory", "slabs", "view")

    def __init__(self, index: int, fd: int) -> None:
        self.index = index
        self.fd = fd
        size = os.fstat(fd).st_size
        self.memory = mmap.mmap(fd, size)
        self.view = memoryview(self.memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.slabs = size // SLAB_BYTES
        self._free = (1 << self.slabs) - 1
        self.bucket: str | None = None
        self.clean = True

    @property
    def idle(self) -> bool:
        return self._free == (1 << self.slabs) - 1

    @property
    def free_slabs(self) -> int:
        return self._free.bit_count()

    def take(self, slabs: int) -> int | None:
        """Offset of ``slabs`` contiguous free slabs, naturally aligned (a buddy system without its lists)."""
        mask = (1 << slabs) - 1
        for position in range(0, self.slabs - slabs + 1, slabs):
            if self._free >> position & mask == mask:
                self._free &= ~(mask << position)
                return position * SLAB_BYTES
        return None

    def give(self, offset: int, slabs: int) -> None:
        bits = ((1 << slabs) - 1) << (offset // SLAB_BYTES)
        assert not self._free & bits, "slab freed twice"
        self._free |= bits

    def read_only_fd(self) -> int:
        """A new descriptor of the same memory that can only ever be mapped for reading."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def scrub(self) -> None:
        """Zero the region (called from a thread: ctypes lets the event loop run meanwhile)."""
        ctypes.memset(self.address, 0, len(self.view))
        self.clean = True


@dataclasses.dataclass(slots=True, eq=False)
class Span:
    """A contiguous piece of one region; starts on a 4 MiB boundary, so O_DIRECT alignment follows file offsets."""

    arena: Arena
    region: Region
    offset: int
    slabs: int
    view: memoryview
    freed: bool = False

    @property
    def size_bytes(self) -> int:
        return self.slabs * SLAB_BYTES

    def free(self) -> None:
        if not self.freed:
            self.freed = True
            self.arena.free(self)


class ArenaDomain:
    """Regions of one bucket (implements ``ingest.ports.Domain``)."""

    def __init__(self, arena: Arena, bucket: str, regions: Sequence[Region]) -> None:
        self.bucket = bucket
        self.regions = tuple(regions)
        self.region_bytes = len(regions[0].view)
        self.region_fds: Sequence[int] = tuple(region.read_only_fd() for region in regions)
        self.users = 0
        self._arena = arena
        self._holds = 0

    def hold(self) -> None:
        self._holds += 1

    def drop(self) -> None:
        self._holds -= 1
        assert self._holds >= 0, "domain dropped more often than held"
        self._arena.retire_idle_domains()

    @property
    def mapped(self) -> bool:
        """A sandbox may still read these regions."""
        return self._holds > 0

    def region_number(self, region: Region) -> int:
        return self.regions.index(region)

    def close(self) -> None:
        for fd in self.region_fds:
            os.close(fd)


class Arena:
    """All memory of one worker. ``scrubber`` runs a function in a thread (the worker's I/O executor)."""

    def __init__(
        self,
        fds: Sequence[int],
        counters: Counters,
        scrubber: Callable[[Callable[[], None]], object] = lambda scrub: scrub(),
    ) -> None:
        self.regions = [Region(index, fd) for index, fd in enumerate(fds)]
        self._domains: dict[str, ArenaDomain] = {}
        self._scrubber = scrubber
        self._waiters: list[Callable[[], None]] = []
        self.size_bytes = sum(len(region.view) for region in self.regions)
        self.used_bytes = 0
        counters.cell("hiss_arena_bytes").set(self.size_bytes)
        self._used = counters.cell("hiss_arena_used_bytes")
        self._used.set(0)
        self.domain_regions = max(1, len(self.regions) // 4)

    # -- spans

    def take(self, size_bytes: int, domain: ArenaDomain | None) -> Span | None:
        """A span of at least ``size_bytes`` in the domain's (or in shared, scrubbed-on-leave) regions, or None."""
        slabs = 1 << max(0, (-(-size_bytes // SLAB_BYTES) - 1).bit_length())
        regions = domain.regions if domain else [region for region in self.regions if region.bucket is None]
        for region in regions:
            offset = region.take(slabs)
            if offset is not None:
                region.clean = False
                self.used_bytes += slabs * SLAB_BYTES
                self._used.set(self.used_bytes)
                view = region.view[offset : offset + slabs * SLAB_BYTES]
                return Span(self, region, offset, slabs, view)
        return None

    def free(self, span: Span) -> None:
        span.region.give(span.offset, span.slabs)
        self.used_bytes -= span.size_bytes
        self._used.set(self.used_bytes)
        self.wake()

    def wake(self) -> None:
        """Tell those who wait for memory to look again."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()

    def notify(self, waiter: Callable[[], None]) -> None:
        """Call ``waiter`` once when memory may have become free."""
        self._waiters.append(waiter)

    def free_slabs(self, domain: ArenaDomain | None) -> int:
        regions = domain.regions if domain else [region for region in self.regions if region.bucket is None]
        return sum(region.free_slabs for region in regions)

    def total_slabs(self, domain: ArenaDomain | None) -> int:
        regions = domain.regions if domain else [region for region in self.regions if region.bucket is None]
        return sum(region.slabs for region in regions)

    # -- isolation domains

    def domain(self, bucket: str) -> ArenaDomain | None:
        """The bucket's domain, made from idle regions if need be; None when too few are idle.

        At least half of the regions always stay shared. Regions that were never used since start or since their last scrub
        are taken first; another is scrubbed on the spot (64 MiB in about 10 ms), before any sandbox can map it.
        """
        if bucket in self._domains:
            return self._domains[bucket]
        shared = [region for region in self.regions if region.bucket is None]
        if len(shared) - self.domain_regions < len(self.regions) // 2:
            self.retire_idle_domains()
            shared = [region for region in self.regions if region.bucket is None]
        idle = sorted(
            (region for region in shared if region.idle), key=lambda region: (not region.clean, -region.index)
        )
        if len(idle) < self.domain_regions or len(shared) - self.domain_regions < len(self.regions) // 2:
            return None
        chosen = idle[: self.domain_regions]
        for region in chosen:
            if not region.clean:
                region.scrub()
            region.bucket = bucket
        domain = self._domains[bucket] = ArenaDomain(self, bucket, chosen)
        logger.info("bucket %s: %d arena regions are now its isolation domain", bucket, len(chosen))
        return domain

    def retire_idle_domains(self) -> None:
        """Give regions back whose sandboxes are all reaped and whose streams are over, scrubbed first."""
        for domain in list(self._domains.values()):
            if domain.mapped or domain.users or not all(region.idle for region in domain.regions):
                continue
            del self._domains[domain.bucket]
            domain.close()
            self._scrubber(lambda domain=domain: self._scrub_domain(domain))  # type: ignore[misc]

    def _scrub_domain(self, domain: ArenaDomain) -> None:
        for region in domain.regions:
            region.scrub()
            region.bucket = None

    # -- start-up

    def prefault(self, stopping: Callable[[], bool]) -> None:
        """Touch every page once, in a thread: the first touch of fresh memory runs at a tenth of the network's rate."""
        for region in self.regions:
            for offset in range(0, len(region.view), SLAB_BYTES):
                if stopping():
                    return
                _libc.madvise(ctypes.c_void_p(region.address + offset), SLAB_BYTES, _MADV_POPULATE_WRITE)
