"""Sandboxes of a process that judges for others, kept for the next object that needs the same one.

In: a recipe (sources, parameters, arrays) and the layout of frames. Out: a ``Seat``: a runner with its window, for one user at a
time. What always holds: at most ``idle_max`` sandboxes wait for a user, the longest unused ends first; a seat whose sandbox
failed is never used again; after ``close`` there is no process and no window left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import numpy.typing as npt
from awscrt import checksums

from ingest.ports import KernelRefused
from ingest.records import FrameGeometry
from kernels.contract import Kernel, Stage, chain_geometries, resolve_arrays
from kernels.gate import admit
from kernels.layout.index import FrameIndex
from kernels.offline.memory import Window, window_bytes
from kernels.offline.pieces import ArrayPlace, Recipe
from kernels.offline.remote import FarBody
from kernels.offline.runner import Runner
from kernels.uploads import HEADER_BYTES_MAX, BadArray, Header, values_of

BAY_BYTES = 32 << 20
"""Of plain frames; a larger frame has a larger bay. There are two: one is judged while the other is loaded."""
BAYS = 2
RECIPES_MAX = 2
Array = npt.NDArray[np.generic]
ReadArray = Callable[[str, ArrayPlace], bytearray]
"""The whole file, by bucket and place. Blocks. Raises Lost, OSError."""


class Unfit(Exception):
    """The kernel's arrays do not fit the frames, or are not what they were; ``str()`` says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """A recipe, read and admitted. ``digest``: of its stages. ``arrays``: of each stage."""

    digest: bytes
    recipe: Recipe
    kernels: tuple[Kernel, ...]
    arrays: tuple[Mapping[str, Array], ...]

    @property
    def kernel(self) -> Kernel:
        return self.kernels[-1]

    def stages(self, settings: int) -> list[Stage]:
        params = self.recipe.settings[settings]
        return [
            Stage(kernel, given, arrays)
            for kernel, given, arrays in zip(self.kernels, params, self.arrays, strict=True)
        ]  # fmt: skip

    def check(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Raises Unfit, as a node leaves such frames waiting (kernels/attach.misfit)."""
        geometries = chain_geometries(self.kernels, (dtype, shape))
        for kernel, arrays, (_, seen) in zip(self.kernels, self.arrays, geometries, strict=True):
            try:
                resolve_arrays(kernel, arrays, seen)
            except KernelRefused as refusal:
                raise Unfit(refusal.reason) from None


@dataclasses.dataclass(slots=True)
class Seat:
    key: tuple[object, ...]
    runner: Runner
    window: Window

    async def end(self) -> None:
        await self.runner.close()
        self.window.close()


class Seats:
    """Belongs to one event loop."""

    def __init__(self, zygote_socket: str, idle_max: int, read_array: ReadArray) -> None:
        self._zygote_socket = zygote_socket
        self._idle_max = idle_max
        self._read_array = read_array
        self._idle: list[Seat] = []
        self._recipes: dict[bytes, Known] = {}
        self._closed = False

    def known(self, recipe: Recipe) -> Known:
        """Read and admit its stages, once. Blocks. Raises Unfit, Lost, OSError, KernelRefused."""
        digest = msgspec.msgpack.encode((recipe.bucket, recipe.stages))
        known = self._recipes.get(digest)
        if known is None:
            kernels = tuple(admit(stage.name, stage.source.encode()) for stage in recipe.stages)
            arrays = tuple(
                {place.name: self._array(recipe.bucket, place) for place in stage.arrays} for stage in recipe.stages
            )
            known = Known(digest, recipe, kernels, arrays)
            while len(self._recipes) >= RECIPES_MAX:
                self._recipes.pop(next(iter(self._recipes)), None)
            self._recipes[digest] = known
        return dataclasses.replace(known, recipe=recipe)

    def _array(self, bucket: str, place: ArrayPlace) -> Array:
        file = self._read_array(bucket, place)
        if checksums.crc64nvme(file) != place.crc64nvme:
            raise Unfit(f"array {place.name}: what was read is not what is stored")
        try:
            header = Header(bytes(file[:HEADER_BYTES_MAX]), len(file))
            return values_of(np.frombuffer(file, np.uint8), header)
        except BadArray as error:
            raise Unfit(f"array {place.name}: {error}") from None

    async def take(self, known: Known, settings: int, geometry: FrameGeometry, body: FarBody | None) -> Seat:
        """``body``: whose frames will be judged there; None for finish() only. ``give`` it back, or ``drop`` it. Raises
        KernelRefused, SandboxFailed, Unfit, ValueError."""
        dtype = np.dtype(geometry.dtype).name
        # 1 and 1.0 are equal, and not the same parameter to a compiler.
        key = (known.digest, repr(known.recipe.settings[settings]), dtype, geometry.shape)
        needed = 1 if body is None else _bay_bytes(body)
        for seat in reversed(self._idle):
            if seat.key == key and seat.window.size_bytes >= needed:
                self._idle.remove(seat)
                return seat
        known.check(dtype, geometry.shape)
        window = Window(needed, BAYS)
        try:
            runner = await Runner.start(self._zygote_socket, known.stages(settings), dtype, geometry.shape, window)
        except BaseException:
            window.close()
            raise
        return Seat(key, runner, window)

    async def give(self, seat: Seat) -> None:
        """It is sound and nobody uses it now."""
        self._idle.append(seat)
        while self._idle and (self._closed or len(self._idle) > self._idle_max):
            await self._idle.pop(0).end()

    async def close(self) -> None:
        self._closed = True
        while self._idle:
            await self._idle.pop().end()
        self._recipes.clear()


def _bay_bytes(body: FarBody) -> int:
    if isinstance(body.layout, FrameIndex):
        # Room for a frame that compression made larger: the next one of a sequence may be such a one.
        return max(window_bytes(body, body.frames), body.frame_bytes * 9 // 8 + (1 << 20))
    return max(body.frame_bytes, BAY_BYTES)
