"""``hiss.kernel-admission``: kernels that are too slow for the rate their bucket has reserved, on a real node."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import botocore.exceptions
import h5py
import httpx
import numpy as np
import pytest

from tests.gateway.conftest import until

FAST = """
STATE = {"total": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    state.total[0] += frame[0, 0]
    return KEEP
"""
SLOW = """
STATE = {"total": ("int64", (1,), "sum")}

def frame(frame, params, state, index, out, feedback):
    total = 0
    for turn in range(400):
        for y in range(frame.shape[0]):
            for x in range(frame.shape[1]):
                total += (np.int64(frame[y, x]) * (turn + 3)) % 7
    state.total[0] += total
    return KEEP
"""
SHAPE = (64, 64)
RATE = 400_000_000
"""A hundred times what SLOW does on any machine; FAST looks at one pixel of a frame."""


def total_of(frames: np.ndarray) -> int:
    """What SLOW counts, with numpy."""
    counts = np.bincount(frames.ravel())
    values = np.arange(len(counts), dtype=np.int64)
    return int(sum((counts * ((values * (turn + 3)) % 7)).sum() for turn in range(400)))


@pytest.fixture(scope="module")
def node(start_node: Callable[..., Any]) -> Any:
    return start_node("--set", "workers=2", "--set", "kernel_cores=2")


@pytest.fixture(scope="module")
def s3(node: Any) -> Iterator[Any]:
    keys = node.keys()
    client = boto3.client(
        "s3",
        endpoint_url=node.url("s3"),
        aws_access_key_id=keys["access_key"],
        aws_secret_access_key=keys["secret_key"],
        region_name="us-east-1",
    )
    yield client
    client.close()


@pytest.fixture(scope="module")
def api(node: Any) -> Iterator[httpx.Client]:
    keys = node.keys()
    with httpx.Client(
        base_url=node.url("control"), auth=(keys["access_key"], keys["secret_key"]), timeout=60
    ) as client:
        yield client


def bucket_for(s3: Any, name: str, policy: str) -> str:
    s3.create_bucket(Bucket=name)
    tags = {"TagSet": [{"Key": "hiss.kernel-admission", "Value": policy}]}
    s3.put_bucket_tagging(Bucket=name, Tagging=tags)
    return name


def reserve(api: httpx.Client, bucket: str, rate: int = RATE, hours: float = 1.0) -> httpx.Response:
    until_text = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600 * hours))
    return api.post("/v1/reservations", json={"bucket": bucket, "rate_bytes_per_s": rate, "until": until_text})


def submit(s3: Any, bucket: str, name: str, source: str, **metadata: str) -> None:
    s3.put_object(Bucket=bucket, Key=f"_kernels/{name}.py", Body=source.encode(), Metadata=metadata)


def shown(api: httpx.Client, bucket: str, name: str) -> dict[str, Any]:
    rows = api.get("/v1/kernels", params={"bucket": bucket}).json()
    return next(row for row in rows if row["name"] == name)


def measured(api: httpx.Client, bucket: str, name: str) -> dict[str, Any]:
    """What the API shows of a kernel once its pace is known."""
    return until(
        lambda: (row := shown(api, bucket, name))["bytes_per_s_per_core"] and row, f"the pace of {bucket}/{name}"
    )


def stream(s3: Any, bucket: str, key: str, count: int = 64) -> np.ndarray:
    frames = np.random.default_rng(5).poisson(3, (count, *SHAPE)).astype(np.uint16)
    target = io.BytesIO()
    np.save(target, frames)
    s3.put_object(Bucket=bucket, Key=key, Body=target.getvalue())
    return frames


def product(s3: Any, bucket: str, kernel: str, key: str) -> int:
    """``total`` of the product, once it is there."""

    def found() -> bytes | None:
        try:
            return s3.get_object(Bucket=bucket, Key=f"_products/{kernel}/{key}.nxs")["Body"].read()
        except botocore.exceptions.ClientError:
            return None

    body = until(found, f"the product of {kernel} over {key}")
    with h5py.File(io.BytesIO(body)) as file:
        totals: list[int] = []
        file.visititems(
            lambda name, item: totals.append(int(np.ravel(item[()])[0])) if name.endswith("/total") else None
        )
    return totals[0]


def counted(node: Any, name: str) -> float:
    text = httpx.get(node.url("control") + "/metrics", timeout=60).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def test_refuse_takes_no_kernel_that_is_too_slow_for_the_slot(s3: Any, api: httpx.Client) -> None:
    bucket = bucket_for(s3, "strict-kernel", "refuse")
    made = reserve(api, bucket)
    assert made.status_code == 201, made.text
    with pytest.raises(botocore.exceptions.ClientError) as refused:
        submit(s3, bucket, "slow", SLOW)
    error = refused.value.response["Error"]
    assert error["Code"] == "InvalidKernel"
    assert f"too slow for reservation {made.json()['id']}" in error["Message"]
    assert "GB/s a core (a dry run on noise, frames of uint16 512×1024)" in error["Message"]
    assert "3.2 Gbps on a node needs" in error["Message"]
    assert "hiss.kernel-admission" in error["Message"]
    submit(s3, bucket, "fast", FAST)
    assert [row["name"] for row in api.get("/v1/kernels", params={"bucket": bucket}).json()] == ["fast"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "def frame(frame, params, state, index, out, feedback):\n"
            "    while index >= 0:\n        index += 1\n    return KEEP\n",
            "timeout",
        ),
        ("def frame(frame, params, state, index, out, feedback):\n    return frame[index + 600, 0] > 0\n", "crash"),
    ],
)
def test_refuse_takes_no_kernel_whose_dry_run_fails(s3: Any, api: httpx.Client, source: str, reason: str) -> None:
    bucket = bucket_for(s3, f"strict-{reason}", "refuse")
    assert reserve(api, bucket).status_code == 201
    with pytest.raises(botocore.exceptions.ClientError) as refused:
        submit(s3, bucket, "bad", source)
    assert refused.value.response["Error"]["Code"] == "InvalidKernel"
    assert f"its dry run over noise failed, so its pace is not known: {reason}" in str(refused.value)


def test_frames_too_large_to_be_made_up_are_not(s3: Any, api: httpx.Client) -> None:
    bucket = bucket_for(s3, "strict-huge", "refuse")
    assert reserve(api, bucket).status_code == 201
    submit(s3, bucket, "fast", FAST, **{"frame-dtype": "uint16", "frame-shape": "100000,100000"})
    assert shown(api, bucket, "fast")["bytes_per_s_per_core"] is None


def test_refuse_makes_no_reservation_that_a_kernel_is_too_slow_for(s3: Any, api: httpx.Client) -> None:
    bucket = bucket_for(s3, "strict-slot", "refuse")
    submit(s3, bucket, "slow", SLOW)
    row = measured(api, bucket, "slow")
    assert row["paced_on"] == "a dry run on noise, frames of uint16 512×1024"
    refused = reserve(api, bucket)
    assert refused.status_code == 409, refused.text
    assert "too slow for it (slow: " in refused.json()["detail"]
    assert reserve(api, bucket, rate=int(row["bytes_per_s_per_core"] / 2)).status_code == 201


def test_warn_says_it_everywhere_and_runs_the_kernel(
    node: Any, s3: Any, api: httpx.Client, here: Callable[..., Any]
) -> None:
    bucket = bucket_for(s3, "warned", "warn")
    submit(s3, bucket, "slow", SLOW)
    measured(api, bucket, "slow")
    made = reserve(api, bucket).json()
    (kernel,) = made["kernels"]
    assert (kernel["kernel"], kernel["fits"]) == ("slow", False)
    assert kernel["cores"] > 2
    at = ("--data", str(node.data_dir))
    assert "kernel TOO SLOW slow: " in here("reserve", "show", made["id"], *at).out
    assert "too slow for reservation" in shown(api, bucket, "slow")["slow"]
    listed = here("kernel", "list", bucket, *at, "--json").json
    assert (listed[0]["state"], listed[0]["slow"][:8]) == ("slow", "too slow")
    frames = stream(s3, bucket, "run/a.npy", 4096)
    assert product(s3, bucket, "slow", "run/a.npy") == total_of(frames)
    row = until(
        lambda: (row := shown(api, bucket, "slow"))["paced_on"].startswith("its streams") and row,
        "a pace of its frames",
    )
    assert row["paced_on"] == "its streams, frames of uint16 64×64"
    assert counted(node, "hiss_kernel_cpu_seconds_total") > 0
    assert until(lambda: counted(node, "hiss_kernels_too_slow"), "the metric") >= 1
    assert api.delete(f"/v1/reservations/{made['id']}").status_code == 200
    assert shown(api, bucket, "slow")["slow"] == ""


def test_catch_up_reduces_what_arrives_with_the_fast_kernel_and_what_is_stored_with_the_slow_one(
    node: Any, s3: Any, api: httpx.Client
) -> None:
    bucket = bucket_for(s3, "late", "catch-up")
    submit(s3, bucket, "slow", SLOW)
    submit(s3, bucket, "fast", FAST)
    measured(api, bucket, "slow")
    measured(api, bucket, "fast")
    made = reserve(api, bucket).json()
    assert "reduces what is stored already" in next(one for one in made["kernels"] if one["kernel"] == "slow")["said"]
    before = counted(node, "hiss_kernel_catchup_frames_total")
    frames = stream(s3, bucket, "run/a.npy")
    assert product(s3, bucket, "fast", "run/a.npy") == int(frames[:, 0, 0].sum())
    assert product(s3, bucket, "slow", "run/a.npy") == total_of(frames)
    assert counted(node, "hiss_kernel_catchup_frames_total") - before == len(frames)
    ledger = json.loads(s3.head_object(Bucket=bucket, Key="run/a.npy")["Metadata"].get("hiss-ledger", "{}"))
    assert ledger.get("unreduced", 0) == 0


def test_catch_up_of_objects_that_are_one_frame(node: Any, s3: Any, api: httpx.Client) -> None:
    """They are packed, and reduced as members of their run."""
    bucket = bucket_for(s3, "late-single", "catch-up")
    submit(s3, bucket, "slow", SLOW)
    submit(s3, bucket, "fast", FAST)
    measured(api, bucket, "slow")
    assert reserve(api, bucket).status_code == 201
    before = counted(node, "hiss_kernel_catchup_frames_total")
    metadata = {"frame-dtype": "uint16", "frame-shape": "64,64"}
    frames = np.random.default_rng(6).poisson(3, (8, *SHAPE)).astype(np.uint16)
    for number, frame in enumerate(frames):
        s3.put_object(Bucket=bucket, Key=f"run/{number:03}.raw", Body=frame.tobytes(), Metadata=metadata)
    s3.put_object(Bucket=bucket, Key="run/_end", Body=b"")
    until(lambda: counted(node, "hiss_kernel_catchup_frames_total") - before == 8, "eight frames from disk")
    rows = until(lambda: (found := api.get("/v1/runs", params={"bucket": bucket}).json()) and found, "the run is known")
    assert rows
