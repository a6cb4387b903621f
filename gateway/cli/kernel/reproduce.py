"""``hiss kernel reproduce``: compute a product again from the stored raw data, and compare bit by bit.

Exit code 0: the same bits; 1: something differs (it is named); 2: it cannot be computed again (raw data gone or changed, an
array gone, a source that is no longer admitted). Another numba, LLVM or processor is named beside either answer.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli import node, options
from gateway.cli.output import CliError, ExitCode, print_json
from gateway.cli.s3 import S3, Missing
from ingest.ports import KernelRefused

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kernels.contract import Kernel
    from kernels.offline.body import Body
    from kernels.offline.replay import Difference
    from kernels.recorded import Recorded, RecordedArray, RecordedInput

CHUNK_BYTES = 1 << 20
PRODUCT_BYTES_MAX = 1 << 30
ARRAY_BYTES_MAX = 512 << 20
DECIDES = ("numba", "llvmlite", "llvm", "numpy", "cpu_target")
"""What of the environment can change bits."""
CRC_HEADER = "x-amz-checksum-crc64nvme"


@dataclasses.dataclass(slots=True)
class Verdict:
    """``differences`` empty: the same bits."""

    frames: int
    differences: list[Difference]


def reproduce(
    product: Annotated[str, typer.Argument(metavar="FILE.nxs|BUCKET/_products/…", help="The product.")],
    raw: Annotated[
        Path | None, typer.Option("--raw", help="Take raw objects from FOLDER/KEY instead of the node.")
    ] = None,
    endpoint: options.Endpoint = "",
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Compute a product again, in the sandbox, from the raw data and everything it records; compare bit by bit."""
    from kernels.offline.replay import Impossible, kernels_of
    from kernels.recorded import NotAProduct, read

    s3 = None
    try:
        if raw is None or not Path(product).is_file():
            s3 = S3(node.find(data, control=control, endpoint=endpoint, access_key=access_key, ca=ca))
        try:
            recorded = read(_product(product, s3))
            notes = _environment_notes(recorded)
            if recorded.error:
                raise Impossible(f"the product has no result, it says why: {recorded.error}")
            kernels, odd = kernels_of(recorded)
            notes += odd
            verdict = _replayed(recorded, kernels, _Raw(s3, raw))
        except (Impossible, NotAProduct) as reason:
            if as_json:
                print_json({"product": product, "reproduced": None, "reason": str(reason)})
            raise CliError(f"{product}: cannot be reproduced: {reason}") from None
    finally:
        if s3 is not None:
            s3.close()
    _report(product, recorded, verdict, notes, as_json=as_json)
    if verdict.differences:
        raise typer.Exit(ExitCode.NO)


def _product(place: str, s3: S3 | None) -> bytes:
    path = Path(place)
    if path.is_file():
        return path.read_bytes()
    assert s3 is not None
    bucket, _, key = place.removeprefix("s3://").partition("/")
    if not key.startswith("_products/"):
        raise CliError(f"{place}: neither a file nor BUCKET/_products/KERNEL/KEY.nxs")
    try:
        return s3.get(bucket, key, most_bytes=PRODUCT_BYTES_MAX).body
    except Missing:
        raise CliError(f"{place}: there is no such product") from None


def _environment_notes(recorded: Recorded) -> list[str]:
    from kernels.lineage import environment

    here = dataclasses.asdict(environment())
    notes = [
        f"{name} was {recorded.environment.get(name, 'not recorded')}, here it is {here[name]}"
        for name in DECIDES
        if recorded.environment.get(name) != here[name]
    ]
    device = recorded.environment.get("device", "cpu")
    return notes if device == "cpu" else [*notes, f"it was computed on {device}, here on cpu"]


def _replayed(recorded: Recorded, kernels: list[Kernel], raw: _Raw) -> Verdict:
    from kernels.offline.replay import Impossible, differences
    from kernels.offline.zygote import NoZygote, private_zygote
    from kernels.sandbox import SandboxFailed

    try:
        with private_zygote() as socket:
            replayed = asyncio.run(_replay(socket, recorded, kernels, raw))
    except KernelRefused as refusal:
        raise Impossible(f"the kernel does not compile here: {refusal}") from None
    except SandboxFailed as failure:
        raise Impossible(f"the kernel failed: {failure}") from None
    except (NoZygote, ValueError) as error:
        raise Impossible(str(error)) from None
    return Verdict(replayed.frames, differences(recorded, replayed))


async def _replay(socket: str, recorded: Recorded, kernels: list[Kernel], raw: _Raw) -> Any:
    from kernels.offline.replay import Replay

    replay = Replay(socket, recorded, kernels, raw.array)
    try:
        for one in recorded.inputs:
            # Fetching waits for the network; nothing else happens on this loop meanwhile.
            for body in raw.bodies(one):
                await replay.add(one, body)
        return await replay.end()
    finally:
        await replay.close()


class _Raw:
    """Raw objects and arrays with the recorded checksums: from the node, or from a folder."""

    def __init__(self, s3: S3 | None, folder: Path | None) -> None:
        self._s3 = s3
        self._folder = folder

    def bodies(self, one: RecordedInput) -> Iterator[Body]:
        """The one body, for as long as it is used. Raises Impossible."""
        from kernels.offline.body import NoFrames, open_body
        from kernels.offline.replay import Impossible

        shown = f"s3://{one.bucket}/{one.key.decode('utf-8', 'backslashreplace')}"
        with tempfile.TemporaryDirectory(prefix="hiss-raw-") as folder:
            file = Path(folder) / "body"
            metadata, content_type = dict(one.metadata), ""
            if self._folder is not None:
                file = self._in_folder(one.key)
                crc = _crc_of(file)
            else:
                crc, said, content_type = self._fetched(one.bucket, one.key, file, shown)
                metadata |= {name: value for name, value in said.items() if name.startswith("frame-")}
            if crc != one.crc64nvme:
                raise Impossible(
                    f"{shown}: has CRC64NVME {crc:016x} now, the product was made of {one.crc64nvme:016x}: it was overwritten, "
                    "filtered or damaged"
                )
            try:
                body = open_body(file, one.key, metadata, content_type)
            except NoFrames as reason:
                raise Impossible(f"{shown}: {reason}") from None
            try:
                yield body
            finally:
                body.close()

    def array(self, use: RecordedArray) -> npt.NDArray[np.generic]:
        """Raises Impossible."""
        import numpy as np

        from kernels.offline.replay import Impossible

        shown = f"array s3://{use.bucket}/{use.key.decode('utf-8', 'backslashreplace')}"
        with tempfile.TemporaryDirectory(prefix="hiss-raw-") as folder:
            file = Path(folder) / "array.npy"
            if self._folder is not None:
                file = self._in_folder(use.key)
                crc = _crc_of(file)
            else:
                crc, _, _ = self._fetched(use.bucket, use.key, file, shown)
            if crc != use.crc64nvme:
                raise Impossible(f"{shown}: has CRC64NVME {crc:016x} now, used was {use.crc64nvme:016x}")
            with io.BytesIO(file.read_bytes()) as content:
                return np.asarray(np.load(content, allow_pickle=False))

    def _in_folder(self, key: bytes) -> Path:
        from kernels.offline.replay import Impossible

        assert self._folder is not None
        # The product names the key: it must not lead out of the folder.
        path = (self._folder / os.fsdecode(key)).resolve()
        if not path.is_relative_to(self._folder.resolve()) or not path.is_file():
            raise Impossible(f"{self._folder} has no file {os.fsdecode(key)!r}")
        return path

    def _fetched(self, bucket: str, key: bytes, file: Path, shown: str) -> tuple[int, dict[str, str], str]:
        """Into ``file``: (CRC64NVME of what arrived, metadata, content type)."""
        from awscrt import checksums

        from kernels.offline.replay import Impossible

        assert self._s3 is not None
        crc = 0
        try:
            with self._s3.stream(bucket, key) as fetched, file.open("wb") as target:
                for chunk in fetched.body(CHUNK_BYTES):
                    crc = checksums.crc64nvme(chunk, crc)
                    target.write(chunk)
                return crc, fetched.metadata, fetched.headers.get("content-type", "")
        except Missing:
            raise Impossible(f"{shown}: is gone") from None
        except OSError as error:
            raise Impossible(f"{shown}: {error}") from None


def _crc_of(file: Path) -> int:
    from gateway.cli.s3put import crc64nvme, mapped

    with mapped(file) as body:
        return int.from_bytes(base64.b64decode(crc64nvme(body)), "big")


def _report(product: str, recorded: Recorded, verdict: Verdict, notes: list[str], *, as_json: bool) -> None:
    same = not verdict.differences
    if as_json:
        print_json(
            {
                "product": product,
                "reproduced": same,
                "inputs": len(recorded.inputs),
                "frames": verdict.frames,
                "differences": [dataclasses.asdict(one) for one in verdict.differences],
                "notes": notes,
            }
        )
        return
    what = f"{len(recorded.inputs)} objects, {verdict.frames} frames"
    print(f"{product}: {'the same, bit by bit' if same else 'DIFFERS'} ({what})")
    for one in verdict.differences:
        print(f"  {one.what}: {one.how}")
    for note in notes:
        print(f"  note: {note}")
