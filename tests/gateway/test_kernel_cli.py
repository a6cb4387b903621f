"""``hiss kernel``: commands run in this process, against a real node with real sandboxes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gateway.cli.s3put import sign
from gateway.users import KeyPair

SOURCE = """\
from hiss import DROP, KEEP, emit

PARAMS = {"low": ("uint16", 12), "gain": ("float64", 2.0)}
STATE = {"hits": ("int64", (1,), "sum"), "spectrum": ("int64", (16,), "sum")}


def frame(frame, params, state, index, out, feedback):
    n = 0
    for y in range(frame.shape[0]):
        for x in range(frame.shape[1]):
            n += frame[y, x] >= params.low
            state.spectrum[frame[y, x] & 15] += 1
    state.hits[0] += n
    emit(feedback, 7, n)
    return KEEP if n >= 3 else DROP
"""
SHAPE = (4, 6)


Ran = Any
Hiss = Callable[..., Ran]


@pytest.fixture
def kernel(here: Hiss, real_node: Any) -> Hiss:
    """``hiss kernel COMMAND …`` against the node."""
    return lambda command, *arguments: here("kernel", command, *arguments, "--data", str(real_node.data_dir))


@pytest.fixture(scope="module")
def keys(real_node: Any) -> KeyPair:
    return KeyPair(**real_node.keys())


@pytest.fixture
def bucket(real_node: Any, keys: KeyPair, request: pytest.FixtureRequest) -> str:
    """A bucket of the test's own."""
    name = f"k{abs(hash(request.node.name)) % 10**12}"
    answer = s3(real_node, keys, "PUT", f"/{name}")
    assert answer.status_code == 200, answer.text
    return name


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "hits.py"
    path.write_text(SOURCE)
    return path


def s3(node: Any, keys: KeyPair, method: str, path: str, body: bytes = b"", **metadata: str) -> httpx.Response:
    url = node.url("s3")
    headers = {"host": url.split("://")[1], **{f"x-amz-meta-{k.replace('_', '-')}": v for k, v in metadata.items()}}
    return httpx.request(
        method, url + path, content=body, headers=sign(method, path, headers, keys, "us-east-1"), timeout=60
    )


def frames(count: int = 10) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 16, (count, *SHAPE), np.uint16)


def put_frames(node: Any, keys: KeyPair, bucket: str, key: str, data: np.ndarray) -> None:
    shape = ",".join(map(str, SHAPE))
    answer = s3(node, keys, "PUT", f"/{bucket}/{key}", data.tobytes(), frame_dtype="uint16", frame_shape=shape)
    assert answer.status_code == 200, answer.text


def test_a_kernel_is_submitted_shown_changed_and_removed(
    kernel: Hiss, real_node: Any, keys: KeyPair, bucket: str, source: Path, poll: Callable[..., Any]
) -> None:
    done = kernel("submit", str(source), "--bucket", bucket, "--match", "run/*", "--params", '{"low": 9}', "--json")
    assert done.code == 0, done.err
    assert done.json["metadata"] == {"match": "run/*", "params": '{"low": 9}'}
    put_frames(real_node, keys, bucket, "run/a.raw", frames())

    def listed() -> Any:
        (row,) = kernel("list", bucket, "--json").json
        return row if row["owed_products"] == 0 else None

    row = poll(listed, "the product is there")
    assert (row["name"], row["state"], row["reason"], row["match"]) == ("hits", "running", "", "run/*")
    assert row["sha256"] == done.json["sha256"]
    shown = kernel("show", f"{bucket}/hits", "--json").json
    assert shown["values"] == {"low": 9, "gain": 2.0}
    assert (shown["source"], shown["products"]) == (SOURCE, 1)
    assert [one["merge"] for one in shown["state_arrays"]] == ["sum", "sum"]
    assert "   7 | def frame(frame, params" in kernel("show", f"{bucket}/hits").out

    changed = kernel("params", f"{bucket}/hits", "low=0x0b", "gain=1e3", "--json").json
    assert (changed["before"]["low"], changed["params"]) == (9, {"low": 11, "gain": 1000.0})
    assert changed["changed"] == ["low", "gain"]
    again = kernel("params", f"{bucket}/hits", "low=11")
    assert "nothing changed" in again.out
    assert kernel("list", bucket, "--json").json[0]["match"] == "run/*", "what was not changed stays"

    gone = kernel("remove", f"{bucket}/hits")
    assert (gone.code, gone.out) == (0, f"removed s3://{bucket}/_kernels/hits.py\n")
    assert kernel("list", bucket, "--json").json == []
    missing = kernel("show", f"{bucket}/hits")
    assert (missing.code, missing.err) == (
        2, f"hiss: bucket {bucket} has no kernel hits; `hiss kernel list {bucket}` shows those it has\n"
    )  # fmt: skip


def test_a_refusal_shows_the_line(kernel: Hiss, bucket: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(SOURCE.replace("n = 0\n", "n = open('x')\n"))
    done = kernel("submit", str(bad), "--bucket", bucket)
    assert done.code == 2
    first, line, mark = done.err.splitlines()
    assert first.startswith("hiss: bad.py:8: ")
    assert line == "hiss:     8 |     n = open('x')"
    assert mark.index("^") == line.index("n = ")
    refused = kernel("submit", str(bad), "--bucket", bucket, "--json")
    assert (refused.code, refused.json["refused"]["line"]) == (2, 8)

    # The gate admits it; only the node's compiler knows better.
    bad.write_text(SOURCE.replace("n += frame[y, x] >=", "n += frame[y, x, 0, 0, 0] >="))
    done = kernel("submit", str(bad), "--bucket", bucket)
    assert done.code == 2
    assert "hiss:    11 |             n += frame[y, x, 0, 0, 0] >= params.low" in done.err
    assert kernel("list", bucket, "--json").json == [], "nothing was stored"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--params", '{"high": 1}'], "parameter 'high' is not in PARAMS (declared: low, gain)"),
        (["--params", '{"high": 1}'], " | PARAMS = {"),
        (["--params", '{"low": 70000}'], "70000 is not a value of uint16"),
        (["--params", "low=1"], "--params: not JSON"),
        (["--array", "mask=m.npy"], "declares no arrays"),
        (["--name", "9"], "is no kernel name"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sent(
    kernel: Hiss, bucket: str, source: Path, arguments: list[str], complaint: str
) -> None:
    done = kernel("submit", str(source), "--bucket", bucket, *arguments)
    assert (done.code, complaint in done.err) == (2, True), done.err


def test_a_kernel_that_fails_is_shown_as_disabled(
    kernel: Hiss, real_node: Any, keys: KeyPair, bucket: str, tmp_path: Path, poll: Callable[..., Any]
) -> None:
    crashing = tmp_path / "crash.py"
    crashing.write_text(SOURCE.replace("    n = 0\n", "    n = 0\n    state.hits[index + 1] = 1\n"))
    assert kernel("submit", str(crashing), "--bucket", bucket).code == 0
    put_frames(real_node, keys, bucket, "run/a.raw", frames())

    def disabled() -> Any:
        (row,) = kernel("list", bucket, "--json").json
        return row if row["state"] == "disabled" else None

    row = poll(disabled, "the kernel is disabled", 60)
    assert "failed 3 times in a row: crash: frame 0: crash.py:9: IndexError" in row["reason"]
    poll(lambda: kernel("list", bucket, "--json").json[0]["failed_products"] == 1, "the product is given up")


def test_no_node_no_bucket_no_kernel(kernel: Hiss, here: Hiss, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = kernel("list", "no-such-bucket")
    assert (done.code, "there is no such bucket" in done.err) == (2, True)
    done = kernel("submit", str(source), "--bucket", "no-such-bucket")
    assert (done.code, "NoSuchBucket" in done.err) == (2, True)
    done = kernel("submit", "no_such_kernel", "--bucket", "no-such-bucket")
    assert (done.code, "neither a file nor a shipped kernel" in done.err) == (2, True)
    monkeypatch.setenv("HISS_ACCESS_KEY", "a")
    monkeypatch.setenv("HISS_SECRET_KEY", "b")
    nowhere = ("--endpoint", "http://127.0.0.1:9", "--control", "http://127.0.0.1:9")
    done = here("kernel", "list", "some-bucket", *nowhere)
    assert (done.code, "does not answer" in done.err) == (4, True)


def test_an_array_for_which_the_kernel_must_change_first(kernel: Hiss, bucket: str, tmp_path: Path) -> None:
    file, mask = tmp_path / "masked.py", tmp_path / "mask.npy"
    frame = "\n\ndef frame(frame, params, state, index, out, feedback):\n    return params.mask[0, 0] > 0\n"
    for dtype in ("uint8", "float32"):
        file.write_text(f'PARAMS = {{"mask": ("{dtype}", "frame")}}{frame}')
        np.save(mask, np.ones(SHAPE, dtype))
        done = kernel("submit", str(file), "--bucket", bucket, "--array", f"mask={mask}")
        assert done.code == 0, done.err
    np.save(mask, np.ones(SHAPE, "float64"))
    refused = kernel("submit", str(file), "--bucket", bucket, "--array", f"mask={mask}")
    assert (refused.code, "float64" in refused.err) == (2, True), refused
