"""What becomes of the products of a replay: staged, compared with the live ones, and stored once everything is over.

In: ``Made`` products. Out: files below a folder, or objects below a prefix; differences. What always holds: until ``publish``
nothing is where the user asked for it, and without it the staging folder is all there is to remove.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from archive.keymap import natural
from gateway.cli.kernel.reproduce import PRODUCT_BYTES_MAX
from gateway.cli.output import CliError
from gateway.cli.s3 import S3, Missing, of_send, shown
from gateway.cli.s3put import SendFailed, mapped
from kernels.attach import PRODUCT_PREFIX
from kernels.offline.assembly import Made
from kernels.offline.replay import Difference, Replayed, differences
from kernels.recorded import NotAProduct, Recorded, read

FOLDER_PREFIX = ".hiss-replay-"


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """A folder, or a bucket and a prefix that ends with a slash (or is empty)."""

    folder: Path | None
    bucket: str = ""
    prefix: str = ""

    @classmethod
    def of(cls, text: str) -> Output:
        if not text.startswith("s3://"):
            return cls(Path(text))
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        if not bucket:
            raise CliError(f"{text}: which bucket? write s3://BUCKET/PREFIX")
        if prefix.startswith(("_products/", "_kernels/")):
            raise CliError(f"{text}: products there are the node's own; choose another prefix, or a folder")
        return cls(None, bucket, f"{prefix.rstrip('/')}/" if prefix else "")

    def place(self, key: bytes) -> str:
        """Where a product comes to lie. ``key``: as a node names it."""
        name = key.removeprefix(PRODUCT_PREFIX)
        if self.folder is not None:
            return str(self.folder / _path(name))
        return f"s3://{self.bucket}/{self.prefix}{shown(name)}"


def _path(name: bytes) -> str:
    """Below the folder, injective, never out of it."""
    return natural("x", name).removeprefix("x/")


@dataclasses.dataclass(frozen=True, slots=True)
class ProductDifference:
    """``product``: the key of the live one."""

    product: str
    what: str
    how: str


class Results:
    """``compared``: how many live products were there."""

    def __init__(self, s3: S3, bucket: str, output: Output | None, *, compare: bool, staging: Path) -> None:
        self.products: list[str] = []
        self.differences: list[ProductDifference] = []
        self.compared = 0
        self._s3 = s3
        self._bucket = bucket
        self._output = output
        self._compare = compare
        self._staging = staging
        self._staged: list[tuple[Path, bytes]] = []

    def take(self, made: Made) -> None:
        """Raises CliError where the node or the disk fails."""
        self.products.append(shown(made.key) if self._output is None else self._output.place(made.key))
        if self._compare:
            self.differences += self._differences(made)
        if self._output is None:
            return
        file = self._staging / str(len(self._staged))
        try:
            with file.open("wb") as target:
                target.write(made.body)
        except OSError as error:
            raise CliError(f"{file}: {error.strerror}") from None
        self._staged.append((file, made.key))

    def _differences(self, made: Made) -> Iterator[ProductDifference]:
        place = shown(made.key)
        try:
            live = read(self._s3.get(self._bucket, made.key, most_bytes=PRODUCT_BYTES_MAX).body)
        except Missing:
            yield ProductDifference(place, "product", "there is no live one")
            return
        except NotAProduct as reason:
            yield ProductDifference(place, "product", str(reason))
            return
        self.compared += 1
        for one in compared(live, read(bytes(made.body))):
            yield ProductDifference(place, one.what, one.how)

    def publish(self) -> None:
        """Everything is over: put the products where they belong. Raises CliError."""
        output = self._output
        if output is None:
            return
        for file, key in self._staged:
            name = key.removeprefix(PRODUCT_PREFIX)
            if output.folder is not None:
                target = output.folder / _path(name)
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, target)
                except OSError as error:
                    raise CliError(f"{target}: {error.strerror}") from None
                continue
            try:
                with mapped(file) as body:
                    self._s3.put(output.bucket, output.prefix + shown(name), body, {"hiss-replayed": "true"})
            except SendFailed as error:
                raise of_send(error) from None


def compared(live: Recorded, now: Recorded) -> list[Difference]:
    """What is not the same: sources, inputs, reasons, and bit by bit what was found."""
    found = []
    if [(stage.name, stage.sha256) for stage in live.stages] != [(stage.name, stage.sha256) for stage in now.stages]:
        found.append(Difference("kernel", "the live product was made with another source"))
    if live.error != now.error:
        found.append(Difference("error", f"{live.error or 'none'!r} in the product, now {now.error or 'none'!r}"))
    then, inputs = ({(one.key, one.crc64nvme, one.frames) for one in each.inputs} for each in (live, now))
    if then != inputs:
        missing, more = len(then - inputs), len(inputs - then)
        found.append(
            Difference(
                "inputs", f"{missing} of the product's are not among those of now, {more} of now not in the product"
            )
        )
    if live.error or now.error:
        return found
    state, rows, result, verdicts = now.state or {}, now.rows, now.result, now.verdicts
    if verdicts is None:
        verdicts = live.verdicts
    assert verdicts is not None or live.verdicts is None
    replayed = Replayed(dict(state), None if result is None else dict(result), rows, verdicts, 0)  # type: ignore[arg-type]
    found += differences(live, replayed)
    for name in ("received", "rows_left_out"):
        if live.counts.get(name) != now.counts.get(name):
            found.append(
                Difference(f"frames/{name}", f"{live.counts.get(name)} in the product, now {now.counts.get(name)}")
            )
    return found


@contextlib.contextmanager
def staging(output: Output | None) -> Iterator[Path]:
    """A folder beside the products (renaming within a file system is atomic), or a temporary one; gone in any case."""
    if output is None or output.folder is None:
        with tempfile.TemporaryDirectory(prefix="hiss-replay-") as temporary:
            yield Path(temporary)
        return
    made = [each for each in (output.folder, *output.folder.parents) if not each.exists()]
    folder = output.folder / f"{FOLDER_PREFIX}{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise CliError(f"--output {output.folder}: {error.strerror}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for each in made:  # what was made for nothing
            with contextlib.suppress(OSError):
                each.rmdir()
