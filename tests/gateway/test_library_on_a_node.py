"""Kernels of the library on a real node: submitted by name with their arrays, chained, fed by PUT; the product against numpy."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np

from gateway.cli.s3put import sign
from gateway.users import KeyPair
from kernels import prepare

SHAPE = (60, 80)


def s3(node: Any, method: str, path: str, body: bytes = b"") -> httpx.Response:
    url = node.url("s3")
    headers = sign(method, path, {"host": url.split("://")[1]}, KeyPair(**node.keys()), "us-east-1")
    return httpx.request(method, url + path, content=body, headers=headers, timeout=60)


def test_corrected_frames_are_integrated(
    here: Callable[..., Any], real_node: Any, tmp_path: Path, poll: Callable[..., Any]
) -> None:
    bucket = "library"
    assert s3(real_node, "PUT", f"/{bucket}").status_code == 200
    rng = np.random.default_rng(5)
    frames = rng.poisson(400, (12, *SHAPE)).astype(np.uint16)
    mask = (rng.random(SHAPE) < 0.02).astype(np.uint8)
    correction = {
        "dark": rng.normal(20, 2, SHAPE).astype(np.float32),
        "flat": rng.normal(1, 0.05, SHAPE).astype(np.float32),
        "mask": mask,
    }
    table = prepare.from_geometry(
        SHAPE, 1000, distance_m=0.2, pixel_m=(1e-4, 1e-4), beam=(30, -5), wavelength_m=1e-10, mask=mask
    )
    for name, arrays, more in (("dark_flat", correction, ()), ("azimuthal", table, ("--after", "dark_flat"))):
        paths = prepare.save(arrays, tmp_path / name)
        given = [part for path in paths for part in ("--array", f"{path.stem}={path}")]
        done = here(
            "kernel", "submit", name, "--bucket", bucket, *given, *more, "--data", str(real_node.data_dir), "--json"
        )
        assert done.code == 0, done.err

    body = io.BytesIO()
    np.save(body, frames)
    assert s3(real_node, "PUT", f"/{bucket}/run/frames.npy", body.getvalue()).status_code == 200

    def product() -> bytes | None:
        answer = s3(real_node, "GET", f"/{bucket}/_products/azimuthal/run/frames.npy.nxs")
        return answer.content if answer.status_code == 200 else None

    with h5py.File(io.BytesIO(poll(product, "the product is there"))) as file:
        intensity = file["entry/result/intensity"][()]
        total = file["entry/state/total"][()]
        assert file["entry/state/frames"][0] == 12
        kept = {name: int(file["entry/frames"][name][()]) for name in ("received", "kept", "dropped")}
    assert kept == {"received": 12, "kept": 12, "dropped": 0}, json.dumps(kept)
    corrected = ((frames.astype(np.float32) - correction["dark"]) / correction["flat"]).astype(float).sum(axis=0)
    used = mask == 0
    sums = np.bincount(table["bin"][used], corrected[used], minlength=1000)
    assert np.allclose(total, sums, rtol=1e-9)
    filled = table["norm"] > 0
    assert np.allclose(intensity[filled], (sums[filled] / 12) / table["norm"][filled], rtol=1e-9)
    assert np.isnan(intensity[~filled]).all()
