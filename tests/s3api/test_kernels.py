"""Keys with a meaning: kernels are checked before they are stored, products are the kernels' own."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

Raw = Callable[..., httpx.Response]
Code = Callable[[httpx.Response], str]

SOURCE = b"def frame(frame, params, state, index, out, feedback):\n    return KEEP\n"


def test_a_kernel_is_stored_like_any_object(raw: Raw, s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="_kernels/hits.py", Body=SOURCE, Metadata={"match": "run/*"})
    got = s3.get_object(Bucket=bucket, Key="_kernels/hits.py")
    assert got["Body"].read() == SOURCE
    assert got["Metadata"] == {"match": "run/*"}


def test_a_kernel_that_does_not_pass(raw: Raw, code_of: Code, bucket: str) -> None:
    answer = raw("PUT", f"/{bucket}/_kernels/hits.py", b"def frame(:\n    pass\n")
    assert (answer.status_code, code_of(answer)) == (400, "InvalidKernel")
    assert "hits.py:1:" in answer.text
    assert raw("HEAD", f"/{bucket}/_kernels/hits.py").status_code == 404


@pytest.mark.parametrize("name", ["hits.txt", "a/b.py", ".py", "9.py", "", "table.npy", "h%20its.py", "hits/9.npy"])
def test_other_names_are_refused(raw: Raw, code_of: Code, bucket: str, name: str) -> None:
    answer = raw("PUT", f"/{bucket}/_kernels/{name}", SOURCE)
    assert (answer.status_code, code_of(answer)) == (400, "InvalidKernel")


def test_a_source_of_more_than_64_kib(raw: Raw, code_of: Code, bucket: str) -> None:
    assert code_of(raw("PUT", f"/{bucket}/_kernels/big.py", b"#" * 65537)) == "EntityTooLarge"


def test_no_kernel_in_parts(raw: Raw, code_of: Code, bucket: str) -> None:
    assert code_of(raw("POST", f"/{bucket}/_kernels/hits.py?uploads")) == "InvalidKernel"


def test_a_copied_kernel_is_checked_too(raw: Raw, code_of: Code, s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="good", Body=SOURCE)
    s3.put_object(Bucket=bucket, Key="bad", Body=b"def")
    s3.copy_object(Bucket=bucket, Key="_kernels/hits.py", CopySource=f"{bucket}/good")
    assert s3.get_object(Bucket=bucket, Key="_kernels/hits.py")["Body"].read() == SOURCE
    answer = raw("PUT", f"/{bucket}/_kernels/hits.py", headers={"x-amz-copy-source": f"{bucket}/bad"})
    assert code_of(answer) == "InvalidKernel"


def test_products_are_read_only(raw: Raw, code_of: Code, bucket: str) -> None:
    path = f"/{bucket}/_products/hits/run/1.nxs"
    for method, query in (("PUT", ""), ("POST", "?uploads")):
        answer = raw(method, path + query, b"x" if method == "PUT" else b"")
        assert (answer.status_code, code_of(answer)) == (403, "AccessDenied")
        assert "written by kernels" in answer.text
    assert raw("DELETE", path).status_code == 204


def npy(values: Any) -> bytes:
    target = io.BytesIO()
    np.save(target, values)
    return target.getvalue()


def test_arrays_are_stored_as_they_are(raw: Raw, s3: Any, bucket: str) -> None:
    array = npy(np.arange(1_000_000, dtype=np.float32))
    s3.put_object(Bucket=bucket, Key="_kernels/hits/flat.npy", Body=array)
    assert s3.get_object(Bucket=bucket, Key="_kernels/hits/flat.npy")["Body"].read() == array
    # What SDKs do with large files.
    upload = s3.create_multipart_upload(Bucket=bucket, Key="_kernels/hits/mask.npy")["UploadId"]
    s3.abort_multipart_upload(Bucket=bucket, Key="_kernels/hits/mask.npy", UploadId=upload)


def test_what_is_no_array_is_refused(raw: Raw, code_of: Code, bucket: str) -> None:
    answer = raw("PUT", f"/{bucket}/_kernels/hits/mask.npy", b"\x89PNG\r\n" * 20000)
    assert (answer.status_code, code_of(answer)) == (400, "InvalidKernel")
    assert "hits/mask.npy:1: not a .npy file" in answer.text
    assert raw("HEAD", f"/{bucket}/_kernels/hits/mask.npy").status_code == 404


def test_an_array_is_checked_however_it_comes(raw: Raw, code_of: Code, s3: Any, bucket: str) -> None:
    """In parts (what SDKs do with large files) and as a copy."""
    good, bad = npy(np.arange(2_000_000, dtype=np.float32)), b"\x89PNG\r\n" * 1_000_000
    key = "_kernels/hits/flat.npy"

    def in_parts(body: bytes) -> str:
        upload = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        parts = []
        for number, start in enumerate(range(0, len(body), 5 << 20), 1):
            part = s3.upload_part(
                Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=body[start : start + (5 << 20)]
            )
            parts.append({"PartNumber": number, "ETag": part["ETag"]})
        s3.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
        return upload

    with pytest.raises(s3.exceptions.ClientError, match=r"not a \.npy file") as refused:
        in_parts(bad)
    assert refused.value.response["Error"]["Code"] == "InvalidKernel"
    assert raw("HEAD", f"/{bucket}/{key}").status_code == 404
    in_parts(good)
    assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == good
    s3.put_object(Bucket=bucket, Key="bad", Body=bad)
    answer = raw("PUT", f"/{bucket}/{key}", headers={"x-amz-copy-source": f"{bucket}/bad"})
    assert (answer.status_code, code_of(answer)) == (400, "InvalidKernel")
    s3.copy_object(Bucket=bucket, Key="_kernels/hits/mask.npy", CopySource=f"{bucket}/{key}")
    assert s3.get_object(Bucket=bucket, Key="_kernels/hits/mask.npy")["Body"].read() == good
