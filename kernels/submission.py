"""The verdict on what somebody puts under ``_kernels/``: a kernel's source, or one of its parameter arrays.

In: the bytes (of an array: its first ones and its length), the object metadata, what the bucket has already. Out: nothing,
or KernelRefused with file, line and reason; KernelsUnavailable where it could not be tried. What is only missing yet is no reason
to refuse: kernels, the kernels before them and arrays may be put in any order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np

from ingest import bucket_settings
from ingest.errors import IngestError, KernelsUnavailable, NoSuchBucket
from ingest.ports import Catalog, KernelRefused
from kernels import uploads
from kernels.attach import Attachment, attach, chained, kernel_name
from kernels.clearance import Clearance
from kernels.contract import Kernel, chain_geometries
from kernels.gate import admit
from kernels.offload.device import check_offload
from kernels.pacing import Pacing
from kernels.registry import KERNELS_MAX, Registry
from kernels.sandbox import DEFAULT_LAYOUTS, SandboxFailed, SandboxLimits, check
from kernels.standing import Verdict

CLEARANCE_WAIT_S = 30.0
"""How long a submitted kernel waits for the sandbox's self-test, which takes half a second once the fork server
has started, and that several seconds on a busy machine."""
CHECK_BACKOFF_S = (0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0)
"""Waits for a fork server that restarts, before a submitted kernel is turned away."""

Layouts = Sequence[tuple[str, int]]


class Submissions:
    def __init__(
        self,
        catalog: Catalog,
        zygote_socket: str,
        registry: Registry,
        clearance: Clearance,
        limits: SandboxLimits,
        pacing: Pacing,
    ) -> None:
        self._catalog = catalog
        self._zygote_socket = zygote_socket
        self._registry = registry
        self._clearance = clearance
        self._limits = limits
        self._pacing = pacing

    async def kernel(self, bucket: str, name: str, source: bytes, metadata: Mapping[str, str]) -> None:
        """Gate, attachment, chain and compiler; compiled for the layout that the metadata declare as for frames, else for
        a default set; a kernel of a chain for what the one before it gives."""
        if kernel_name(f"_kernels/{name}.py".encode()) is None:
            raise KernelRefused(f"{name}.py", 1, "a kernel's name is a letter, then letters, digits, _ or -")
        kernel = await asyncio.to_thread(admit, name, source)
        attachment = attach(kernel, metadata)
        if attachment.raw != "all":
            await self._may_filter(bucket, attachment)
        layouts: Layouts = DEFAULT_LAYOUTS
        if attachment.frames is not None:
            dtype, shape = attachment.frames
            layouts = ((dtype, len(shape)),)
        if attachment.device == "fpga":
            await asyncio.to_thread(check_offload, kernel, attachment.frames)
        others = await self._others(bucket)
        if name not in others and len(others) >= KERNELS_MAX:
            raise KernelRefused(
                kernel.file, 1, f"the bucket has {len(others)} kernels, which is the most that run: remove one first"
            )
        whole = chained(attachment, others | {name: attachment})
        await self._compile(whole, _reached(whole, layouts))
        await self._pacing.judge(bucket, whole, [one for one in others.values() if one.name != name])

    async def _may_filter(self, bucket: str, attachment: Attachment) -> None:
        try:
            tags = (await self._catalog.bucket(bucket)).tags
        except NoSuchBucket:
            return
        except IngestError as error:
            raise KernelsUnavailable(f"the bucket's settings cannot be read at the moment: {error}") from None
        if bucket_settings.parse(tags).raw_filter != "allow":
            raise KernelRefused(
                attachment.kernel.file,
                1,
                f"x-amz-meta-raw: {attachment.raw} takes raw data away, and the bucket does not allow it: its administrator "
                "sets the bucket's tag hiss.raw-filter=allow",
            )

    async def _others(self, bucket: str) -> dict[str, Attachment]:
        try:
            await self._registry.refresh(bucket)
        except NoSuchBucket:
            return {}
        except IngestError as error:
            raise KernelsUnavailable(f"the bucket's kernels cannot be read at the moment: {error}") from None
        return {attachment.name: attachment for attachment in self._registry.known(bucket)}

    async def _compile(self, attachment: Attachment, layouts: Layouts) -> None:
        kernel = attachment.kernel
        standing = await self._clearance.decided(CLEARANCE_WAIT_S)
        if standing.verdict is Verdict.REFUSED:
            raise KernelRefused(kernel.file, 1, f"no kernel runs here: {standing.reason}")
        if not standing.runs:
            raise KernelsUnavailable(f"kernels cannot be compiled at the moment: {standing.reason}")
        first: KernelRefused | None = None
        for layout in layouts:
            # One at a time: the first that compiles is enough, and the scientist waits for the answer.
            try:
                await self._try(kernel, layout)
            except KernelRefused as refusal:
                first = first or refusal
            else:
                return
        assert first is not None
        raise first

    async def _try(self, kernel: Kernel, layout: tuple[str, int]) -> None:
        failure = SandboxFailed("unavailable", "")
        for wait_s in CHECK_BACKOFF_S:
            try:
                await check(self._zygote_socket, kernel, (layout,), self._limits)
            except SandboxFailed as error:
                failure = error
            else:
                return
            if failure.kind != "unavailable":
                raise KernelRefused(kernel.file, 1, f"does not compile: {failure}") from None
            await asyncio.sleep(wait_s)
        raise KernelsUnavailable(f"kernels cannot be compiled at the moment: {failure.message}")

    async def array(self, bucket: str, kernel: str, name: str, head: bytes, length: int) -> None:
        """A whole .npy file of plain numbers; one that the kernel declares and that fits, where the kernel is there."""
        file = f"{kernel}/{name}.npy"
        try:
            header = uploads.Header(head, length)
        except uploads.BadArray as error:
            raise KernelRefused(file, 1, str(error)) from None
        attachment = (await self._others(bucket)).get(kernel)
        if attachment is None:
            return
        specs = {spec.name: spec for spec in attachment.kernel.arrays}
        if name not in specs:
            declared = ", ".join(specs) or "none"
            raise KernelRefused(file, 1, f"{kernel}.py declares no array {name!r} in PARAMS (declared: {declared})")
        if reason := uploads.misfit(specs[name], header.dtype, header.shape):
            raise KernelRefused(file, 1, f"{reason}; if the kernel is to change, put the kernel first")


def _reached(attachment: Attachment, layouts: Layouts) -> Layouts:
    """What the kernel gets as its frame, where frames of these layouts come to the first of its chain."""
    kernels = [stage.kernel for stage in attachment.stages]
    reached = [chain_geometries(kernels, (dtype, (2,) * ndim))[-1] for dtype, ndim in layouts]
    return tuple(dict.fromkeys((np.dtype(dtype).str, len(shape)) for dtype, shape in reached))
