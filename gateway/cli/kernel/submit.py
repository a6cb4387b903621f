"""``hiss kernel submit``: arrays first, then the kernel, so that its first frames find everything there.

Exit code 0: the gate and the compiler of the node have admitted it; 2: refused, with the line.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Annotated

import typer

from gateway.cli import node, options
from gateway.cli.kernel.source import ArrayFile, Given, Refused, load, params_text, parse_arrays, parse_params
from gateway.cli.output import CliError, print_json
from gateway.cli.s3 import S3, of_send
from gateway.cli.s3put import SendFailed, Sent, mapped
from ingest.ports import KernelRefused


class Raw(enum.StrEnum):
    ALL = "all"
    KEPT = "kept"
    NONE = "none"


class Device(enum.StrEnum):
    CPU = "cpu"
    FPGA = "fpga"


What = Annotated[str, typer.Argument(metavar="FILE|NAME", help="A kernel file, or the name of a shipped kernel.")]
Params = Annotated[str, typer.Option("--params", metavar="JSON", help='Parameters, e.g. {"low": 12}.')]
Arrays = Annotated[
    list[str] | None, typer.Option("--array", metavar="NAME=FILE.npy", help="A parameter array; repeatable.")
]

Constants = Annotated[
    list[str] | None, typer.Option("--constant", metavar="NAME=VALUE", help="A number at the top of a shipped kernel.")
]


def submit(
    what: What,
    bucket: Annotated[str, typer.Option("--bucket", help="Where it is to run.")],
    match: Annotated[str, typer.Option(help="Glob over keys; * crosses /.")] = "*",
    params: Params = "",
    arrays: Arrays = None,
    constants: Constants = None,
    raw: Annotated[Raw, typer.Option(help="What of the raw frames stays (needs hiss.raw-filter=allow).")] = Raw.ALL,
    after: Annotated[str, typer.Option(metavar="KERNEL", help="Its frames are this kernel's OUT.")] = "",
    device: Annotated[Device, typer.Option(help="What it runs on.")] = Device.CPU,
    name: Annotated[str, typer.Option(help="Its name in the bucket; default: the file's.")] = "",
    endpoint: options.Endpoint = "",
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Submit a kernel to a bucket: from the next frame on it runs. Exit code 2 with file, line and reason if refused."""
    bucket = options.bucket_of(bucket)
    try:
        given = load(what, name, constants or ())
        values = parse_params(params)
        chosen = {
            "match": (match, "*"),
            "raw": (raw.value, "all"),
            "device": (device.value, "cpu"),
            "after": (after, ""),
        }
        metadata = {key: value for key, (value, default) in chosen.items() if value != default}
        if values:
            metadata["params"] = params_text(values)
        check_metadata(given, metadata)
        files = parse_arrays(given.kernel, arrays or ())
        with S3(node.find(data, control=control, endpoint=endpoint, access_key=access_key, ca=ca)) as s3:
            stored, late = [], []
            for file in files:
                try:
                    stored.append(_put_array(s3, bucket, given.kernel.name, file))
                except ArrayRefused:
                    # It does not fit the kernel that is there now, which is about to change.
                    late.append(file)
            sent = put_kernel(s3, bucket, given, metadata)
            stored += [_put_array(s3, bucket, given.kernel.name, file) for file in late]
    except Refused as refusal:
        if as_json:
            refusal.print_json()
        raise
    missing = [spec.name for spec in given.kernel.arrays if spec.name not in {file.name for file in files}]
    if as_json:
        print_json(
            {
                "kernel": given.kernel.name, "bucket": bucket, "sha256": given.kernel.sha256, "etag": sent.etag,
                "metadata": metadata, "arrays": [dataclasses.asdict(one) for one in stored], "arrays_not_sent": missing,
            }
        )  # fmt: skip
        return
    print(f"s3://{bucket}/_kernels/{given.kernel.file}: admitted, sha256 {given.kernel.sha256[:12]}")
    print(f"runs on keys that match {match!r}" + (f", after {after}" if after else ""))
    if missing:
        print(f"not sent: {', '.join(missing)}; frames wait on disk for arrays that the bucket does not have")


class ArrayRefused(CliError):
    """The node does not take an array: no kernel could, or not the one that is there."""


def check_metadata(given: Given, metadata: Mapping[str, str]) -> None:
    """What the node would say to them, before anything is sent. Raises Refused."""
    from kernels.attach import attach

    try:
        attach(given.kernel, metadata)
    except KernelRefused as refusal:
        raise Refused.of(refusal, given.text) from None


def put_kernel(s3: S3, bucket: str, given: Given, metadata: Mapping[str, str], *, if_match: str = "") -> Sent:
    """Raises Refused for a kernel the node does not admit, else CliError."""
    key = f"_kernels/{given.kernel.file}"
    try:
        return s3.put(bucket, key, memoryview(given.bytes), metadata, if_match=if_match)
    except SendFailed as error:
        if error.answer is not None and error.answer.code == "InvalidKernel":
            refused = Refused.of_message(error.answer.message, given.text)
            if refused is not None:
                raise refused from None
        if error.answer is not None and error.answer.status == 412:
            raise CliError(
                f"s3://{bucket}/{key}: somebody else changed it meanwhile; look at it and try again"
            ) from None
        raise of_send(error) from None


def _put_array(s3: S3, bucket: str, kernel: str, array: ArrayFile) -> Sent:
    key = f"_kernels/{kernel}/{array.name}.npy"
    try:
        with mapped(array.file) as body:
            return dataclasses.replace(s3.put(bucket, key, body, {}), file=str(array.file))
    except SendFailed as error:
        if error.answer is not None and error.answer.code == "InvalidKernel":
            raise ArrayRefused(error.answer.message) from None
        raise of_send(error) from None
    except OSError as error:
        raise CliError(f"{array.file}: {error}") from None
