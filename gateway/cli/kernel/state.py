"""What there is to know of a submitted kernel: its object, its arrays, and what the node says of it.

In: ``/v1/kernels`` and the source from S3. Out: ``Submitted`` with one word for its state and a reason. Pure but for
``submitted`` and ``place``.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from gateway.cli import node
from gateway.cli.kernel.source import admitted
from gateway.cli.output import CliError
from gateway.cli.s3 import S3, Missing

if TYPE_CHECKING:
    from kernels.contract import Kernel

SOURCE_BYTES_MAX = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Submitted:
    """``row`` is the control API's document; ``kernel`` is None where the source no longer passes this gate."""

    name: str
    row: dict[str, Any]
    source: bytes
    kernel: Kernel | None
    refusal: str
    missing_before: str = ""
    """The kernel that ``after`` names, where the bucket has none of that name."""
    left_out: bool = False
    """The bucket has more kernels than run."""

    @property
    def missing_arrays(self) -> list[str]:
        declared = self.kernel.arrays if self.kernel is not None else ()
        return [spec.name for spec in declared if spec.name not in self.row["arrays"]]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()

    @property
    def failure(self) -> dict[str, Any] | None:
        """The worst that some worker says of this very source."""
        of_this = [one for one in self.row["failures"] if one["sha256"] == self.sha256]
        return max(of_this, key=lambda one: (one["disabled"], one["count"]), default=None)

    @property
    def state(self) -> tuple[str, str]:
        """(refused | left out | disabled | waiting | failing | slow | running, why). What does not go as it was wanted fails."""
        failure = self.failure
        if self.kernel is None:
            return "refused", self.refusal
        if self.left_out:
            return "left out", "the bucket has more kernels than run: remove others, or this one"
        if failure is not None and failure["disabled"]:
            where = f" on node {failure['node']}" if failure.get("node") else ""
            return (
                "disabled",
                f"failed {failure['count']} times in a row{where}: {failure['error']}; submit another source",
            )
        if self.missing_arrays:
            arrays = ", ".join(self.missing_arrays)
            return "waiting", f"for array {arrays}: `hiss kernel submit … --array {self.missing_arrays[0]}=FILE.npy`"
        if self.missing_before:
            return "waiting", f"for kernel {self.missing_before}, whose out are its frames: `hiss kernel submit`"
        if failure is not None:
            return "failing", failure["error"]
        if self.row.get("notices"):
            return "failing", self.row["notices"][0]
        if self.row.get("slow"):
            return "slow", self.row["slow"]
        return "running", self.row["last_error"] or self.row.get("waits", "")

    def document(self) -> dict[str, Any]:
        """For --json."""
        state, reason = self.state
        row = {name: value for name, value in self.row.items() if name != "failures"}
        return {**row, "sha256": self.sha256, "state": state, "reason": reason, "missing_arrays": self.missing_arrays}


def submitted(found: node.Node, s3: S3, bucket: str, name: str = "") -> list[Submitted]:
    """Every kernel of the bucket, or the one of that name. Raises CliError, Missing when there is none of that name."""
    from kernels.registry import KERNELS_MAX

    rows = found.ask("/v1/kernels", bucket=bucket)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "failures" in row for row in rows):
        raise CliError("/v1/kernels: the answer is not one that is known here; are node and hiss of one version?")
    names = {row["name"] for row in rows}
    # As the node lists them: by key.
    left_out = set(sorted(names, key=lambda one: f"{one}.py")[KERNELS_MAX:])
    if name:
        rows = [row for row in rows if row["name"] == name]
        if not rows:
            raise Missing(f"bucket {bucket} has no kernel {name}; `hiss kernel list {bucket}` shows those it has")
    kernels = []
    for row in rows:
        try:
            source = s3.get(bucket, f"_kernels/{row['name']}.py", most_bytes=SOURCE_BYTES_MAX).body
        except Missing:  # removed meanwhile
            continue
        kernels.append(_read(row, source, names, row["name"] in left_out))
    return kernels


def _read(row: dict[str, Any], source: bytes, names: set[str], left_out: bool) -> Submitted:
    before = row["after"] if row["after"] and row["after"] not in names else ""
    try:
        return Submitted(row["name"], row, source, admitted(row["name"], source).kernel, "", before, left_out)
    except CliError as refusal:
        return Submitted(row["name"], row, source, None, str(refusal).splitlines()[0], before)


def place(text: str) -> tuple[str, str]:
    """``BUCKET/KERNEL`` -> both; also ``s3://BUCKET/_kernels/KERNEL.py``. Raises CliError."""
    bucket, _, name = text.removeprefix("s3://").partition("/")
    name = name.removeprefix("_kernels/").removesuffix(".py")
    if not bucket or not name or "/" in name:
        raise CliError(f"{text!r} is no kernel: write it as BUCKET/KERNEL")
    return bucket, name
