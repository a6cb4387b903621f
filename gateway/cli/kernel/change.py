"""``hiss kernel params`` and ``hiss kernel remove``: changing what runs in a bucket.

New parameters are the same source put again, under the condition that nobody put another source meanwhile (an ETag speaks
of the source alone: of two people who change parameters at once, the later one wins). Running streams take them at a frame
boundary; products name the frame.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gateway.cli import node, options
from gateway.cli.kernel.source import Refused, admitted, params_text, parse_assignments
from gateway.cli.kernel.state import SOURCE_BYTES_MAX, place
from gateway.cli.kernel.submit import check_metadata, put_kernel
from gateway.cli.output import CliError, print_json, print_table
from gateway.cli.s3 import S3, Missing

ARRAYS_MAX = 100

Place = Annotated[str, typer.Argument(metavar="BUCKET/KERNEL", help="A submitted kernel.")]


def params(
    kernel: Place,
    assignments: Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE...]", help="New values.")] = None,
    endpoint: options.Endpoint = "",
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Show a kernel's parameters, or change some: a new epoch begins at a frame boundary of every running stream."""
    bucket, name = place(kernel)
    changes = parse_assignments(assignments or ())
    with S3(node.find(data, control=control, endpoint=endpoint, access_key=access_key, ca=ca)) as s3:
        stored = s3.get(bucket, f"_kernels/{name}.py", most_bytes=SOURCE_BYTES_MAX)
        try:
            given = admitted(name, stored.body)
            metadata = dict(stored.metadata)
            old = json.loads(metadata.get("params", "{}"))
            defaults = {spec.name: spec.default for spec in given.kernel.params}
            before = {**defaults, **old}
            after = {**before, **changes}
            since = stored.headers.get("last-modified", "")
            if changes and after != before:
                # Only what differs from the source's own defaults, or was given before, is written down.
                metadata["params"] = params_text({**old, **changes})
                check_metadata(given, metadata)
                put_kernel(s3, bucket, given, metadata, if_match=stored.etag)
                since = s3.head(bucket, f"_kernels/{name}.py").headers.get("last-modified", "")
        except Refused as refusal:
            if as_json:
                refusal.print_json()
            raise
    changed = [key for key in after if key in changes and before.get(key) != after[key]]
    if as_json:
        print_json(
            {"bucket": bucket, "kernel": name, "before": before, "params": after, "changed": changed, "since": since}
        )
        return
    rows = [(key, before[key], "→" if key in changed else "", after[key] if key in changed else "") for key in after]
    print_table(("parameter", "value", "", "new"), rows)
    if changed:
        print(f"a new epoch since {since}: running streams take it at their next frame boundary")
    elif changes:
        print("nothing changed")


def remove(
    kernel: Place,
    keep_arrays: Annotated[bool, typer.Option("--keep-arrays", help="Leave its arrays for a later kernel.")] = False,
    endpoint: options.Endpoint = "",
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Remove a kernel and its arrays from a bucket. Its products stay."""
    bucket, name = place(kernel)
    with S3(node.find(data, control=control, endpoint=endpoint, access_key=access_key, ca=ca)) as s3:
        key = f"_kernels/{name}.py"
        try:
            s3.head(bucket, key)
        except Missing:
            raise CliError(
                f"bucket {bucket} has no kernel {name}; `hiss kernel list {bucket}` shows those it has"
            ) from None
        s3.delete(bucket, key)
        arrays = [] if keep_arrays else s3.list(bucket, f"_kernels/{name}/", most=ARRAYS_MAX)
        for array in arrays:
            s3.delete(bucket, array.key)
    removed = [key, *(array.key.decode("utf-8", "backslashreplace") for array in arrays)]
    if as_json:
        print_json({"bucket": bucket, "removed": removed})
        return
    for one in removed:
        print(f"removed s3://{bucket}/{one}")
