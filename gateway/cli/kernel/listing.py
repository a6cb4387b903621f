"""``hiss kernel list`` and ``hiss kernel show``: which kernels there are, how they do, and what exactly they are."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer

from gateway.cli import node, options
from gateway.cli.kernel.change import Place
from gateway.cli.kernel.state import Submitted, place, submitted
from gateway.cli.output import CliError, print_json, print_table
from gateway.cli.s3 import S3
from gateway.cli.status import shown

PRODUCTS_COUNTED_MAX = 10_000
RUN_PRODUCT = re.compile(rb"/_run(\.[0-9a-f]{8})?\.nxs$")
"""Of the run as it is, and of older settings (kernels/runs/names.py)."""


def list_kernels(
    bucket: Annotated[str, typer.Argument(metavar="[BUCKET]", help="Whose kernels.")] = "",
    library: Annotated[bool, typer.Option("--library", help="The shipped kernels instead.")] = False,
    endpoint: options.Endpoint = "",
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Kernels of a bucket and how they do; or those that come with hiss."""
    if library:
        _list_library(as_json)
        return
    bucket = options.bucket_of(bucket)
    if not bucket:
        raise CliError("which bucket? hiss kernel list BUCKET, or hiss kernel list --library")
    found = node.find(data, control=control, endpoint=endpoint, access_key=access_key, ca=ca)
    with S3(found) as s3:
        kernels = submitted(found, s3, bucket)
    if as_json:
        print_json([kernel.document() for kernel in kernels])
        return
    rows = []
    for kernel in kernels:
        state, reason = kernel.state
        row = kernel.row
        rows.append(
            (kernel.name, state, row["match"], row["params"], row["after"], row["raw"], row["device"],
             gigabytes(row["bytes_per_s_per_core"]), row["owed_products"], row["failed_products"], reason)
        )  # fmt: skip
    columns = ("kernel", "state", "match", "params", "after", "raw", "device", "GB/s a core", "owed", "failed", "why")
    print_table(columns, rows)
    if not rows:
        print(f"bucket {bucket} has no kernels; submit one: hiss kernel submit FILE --bucket {bucket}")


def gigabytes(bytes_per_s: float | None) -> str:
    return "–" if bytes_per_s is None else f"{bytes_per_s / 1e9:.3g}"


def _list_library(as_json: bool) -> None:
    from kernels import library

    if as_json:
        rows = [
            {"name": name, "description": library.describe(name), "constants": library.constants(name)}
            for name in library.names()
        ]
        print_json(rows)
        return
    print_table(("kernel", "what it computes"), [(name, library.summary(name)) for name in library.names()])


def show(
    kernel: Place,
    endpoint: options.Endpoint = "",
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """One kernel: its source, parameters, arrays, state, last error and products."""
    bucket, name = place(kernel)
    found = node.find(data, control=control, endpoint=endpoint, access_key=access_key, ca=ca)
    with S3(found) as s3:
        (one,) = submitted(found, s3, bucket, name)
        products = s3.list(bucket, f"_products/{name}/", most=PRODUCTS_COUNTED_MAX)
        arrays = {
            array.key.decode("utf-8", "backslashreplace").rpartition("/")[2].removesuffix(".npy"): array.size_bytes
            for array in s3.list(bucket, f"_kernels/{name}/", most=100)
        }
    runs = sum(RUN_PRODUCT.search(product.key) is not None for product in products)
    counts = {"products": len(products) - runs, "runs": runs, "more_products": len(products) == PRODUCTS_COUNTED_MAX}
    document = {**one.document(), **_declared(one), "array_bytes": arrays, **counts}
    if as_json:
        print_json({**document, "source": one.source.decode("utf-8", "replace")})
        return
    _print(bucket, one, document)


def _declared(one: Submitted) -> dict[str, Any]:
    """What the source declares, with the values in force."""
    if one.kernel is None:
        return {"values": {}, "state_arrays": [], "declared_arrays": []}
    given = json.loads(one.row["params"])
    return {
        "values": {spec.name: given.get(spec.name, spec.default) for spec in one.kernel.params},
        "state_arrays": [
            {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "merge": spec.merge}
            for spec in one.kernel.state
        ],
        "declared_arrays": [
            {"name": spec.name, "dtype": spec.dtype, "shape": "frame" if spec.shape is None else list(spec.shape)}
            for spec in one.kernel.arrays
        ],
    }


def _print(bucket: str, one: Submitted, document: dict[str, Any]) -> None:
    more = " or more" if document["more_products"] else ""
    pace = one.row["bytes_per_s_per_core"]
    counted = f"{document['products']} of objects, {document['runs']} of runs{more}"
    facts = [
        ("kernel", f"s3://{bucket}/_kernels/{one.name}.py"),
        ("state", document["state"] + (f": {document['reason']}" if document["reason"] else "")),
        ("submitted", shown("_ns", one.row["modified_ns"])),
        ("sha256", document["sha256"]),
        *((word, one.row[word]) for word in ("match", "after", "raw", "device") if one.row[word]),
        ("products", f"{counted}, {one.row['owed_products']} owed, {one.row['failed_products']} failed"),
        ("pace", f"{gigabytes(pace)} GB/s a core ({one.row['paced_on']})" if pace else "not measured yet"),
        ("last error", one.row["last_error"] or "–"),
        *((("waits", one.row["waits"]),) if one.row.get("waits") else ()),
        *(("on node " + failed["node"], failed["error"]) for failed in one.row["failures"] if failed.get("node")),
    ]
    print_table(("", ""), facts)
    if document["values"]:
        print_table(("parameter", "value"), list(document["values"].items()))
    if document["declared_arrays"]:
        sizes = document["array_bytes"]
        rows = [
            (
                each["name"],
                each["dtype"],
                each["shape"],
                shown("_bytes", sizes[each["name"]]) if each["name"] in sizes else "missing",
            )
            for each in document["declared_arrays"]
        ]
        print_table(("array", "dtype", "shape", "stored"), rows)
    if document["state_arrays"]:
        rows = [(each["name"], each["dtype"], each["shape"], each["merge"]) for each in document["state_arrays"]]
        print_table(("state", "dtype", "shape", "merge"), rows)
    print()
    for number, line in enumerate(one.source.decode("utf-8", "replace").splitlines(), 1):
        print(f"{number:4} | {line}")
