"""Every client puts and gets an object of 100 MB byte for byte, against a node as an operator starts it."""

from __future__ import annotations

import filecmp
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import boto3
import botocore.config
import pytest
from boto3.s3.transfer import TransferConfig

from gateway.demo.node import DemoNode

Peer = Callable[[str], str]
REGION = "us-east-1"


def run(*command: str, **environ: str) -> str:
    # What this machine has configured for AWS or rclone is not for these tests.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_"))}
    done = subprocess.run(command, env={**clean, **environ}, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def same(first: Path, second: Path) -> bool:
    """Every byte, and the second is removed: a hundred megabytes for each client add up."""
    equal = filecmp.cmp(first, second, shallow=False)
    second.unlink()
    return equal


@pytest.fixture
def aws_environ(node: DemoNode, tmp_path: Path) -> dict[str, str]:
    """Credentials as the AWS tools read them, and nothing of this machine's own configuration."""
    return {
        "AWS_ACCESS_KEY_ID": node.keys.access_key,
        "AWS_SECRET_ACCESS_KEY": node.keys.secret_key,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL": node.s3_url,
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def test_aws_cli(node: DemoNode, hundred_mb: Path, peer: Peer, aws_environ: dict[str, str], tmp_path: Path) -> None:
    """``s3 cp`` both ways (parts up, ranges down), and one PUT without parts."""
    aws, back = peer("aws"), tmp_path / "back"
    run(aws, "s3", "cp", "--quiet", str(hundred_mb), "s3://clients/aws/parts", **aws_environ)
    run(aws, "s3", "cp", "--quiet", "s3://clients/aws/parts", str(back), **aws_environ)
    assert same(hundred_mb, back)
    one = ("--bucket", "clients", "--key", "aws/one")
    run(aws, "s3api", "put-object", *one, "--body", str(hundred_mb), **aws_environ)
    run(aws, "s3api", "get-object", *one, "--checksum-mode", "ENABLED", str(back), **aws_environ)
    assert same(hundred_mb, back)
    listed = run(aws, "s3", "ls", "s3://clients/aws/", **aws_environ)
    assert [line.split()[2:] for line in listed.splitlines()] == [["100000000", "one"], ["100000000", "parts"]]


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned-payload"])
def test_boto3(node: DemoNode, hundred_mb: Path, tmp_path: Path, signed: bool) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=node.s3_url,
        region_name=REGION,
        aws_access_key_id=node.keys.access_key,
        aws_secret_access_key=node.keys.secret_key,
        config=botocore.config.Config(s3={"payload_signing_enabled": signed}),
    )
    back, key = tmp_path / "back", f"boto3/{signed}"
    try:
        with hundred_mb.open("rb") as body:
            client.put_object(Bucket="clients", Key=key, Body=body)
        client.download_file("clients", key, str(back))
        assert same(hundred_mb, back)
        parts = TransferConfig(multipart_threshold=16 << 20, multipart_chunksize=16 << 20)
        client.upload_file(str(hundred_mb), "clients", key, Config=parts)
        with back.open("wb") as file:
            for block in client.get_object(Bucket="clients", Key=key)["Body"].iter_chunks(1 << 20):
                file.write(block)
        assert same(hundred_mb, back)
    finally:
        client.close()


def test_s5cmd(node: DemoNode, hundred_mb: Path, peer: Peer, aws_environ: dict[str, str], tmp_path: Path) -> None:
    s5cmd, back = peer("s5cmd"), tmp_path / "back"
    base = (s5cmd, "--endpoint-url", node.s3_url)
    run(*base, "cp", str(hundred_mb), "s3://clients/s5cmd/frames", **aws_environ)
    run(*base, "cp", "s3://clients/s5cmd/frames", str(back), **aws_environ)
    assert same(hundred_mb, back)


def test_rclone(node: DemoNode, hundred_mb: Path, peer: Peer, tmp_path: Path) -> None:
    """One PUT, and parts; rclone compares sizes and checksums itself, too."""
    rclone, back = peer("rclone"), tmp_path / "back"
    environ = {
        "RCLONE_CONFIG": str(tmp_path / "rclone.conf"),
        "RCLONE_CONFIG_HISS_TYPE": "s3",
        "RCLONE_CONFIG_HISS_PROVIDER": "Other",
        "RCLONE_CONFIG_HISS_ENDPOINT": node.s3_url,
        "RCLONE_CONFIG_HISS_REGION": REGION,
        "RCLONE_CONFIG_HISS_ACCESS_KEY_ID": node.keys.access_key,
        "RCLONE_CONFIG_HISS_SECRET_ACCESS_KEY": node.keys.secret_key,
    }
    Path(environ["RCLONE_CONFIG"]).touch()
    for name, cutoff in (("one", "200M"), ("parts", "16M")):
        flags = ("--retries", "1", "--s3-upload-cutoff", cutoff)
        run(rclone, "copyto", *flags, str(hundred_mb), f"hiss:clients/rclone/{name}", **environ)
        run(rclone, "copyto", "--retries", "1", f"hiss:clients/rclone/{name}", str(back), **environ)
        assert same(hundred_mb, back)


def test_curl(node: DemoNode, hundred_mb: Path, peer: Peer, tmp_path: Path) -> None:
    curl, back = peer("curl"), tmp_path / "back"
    base = (
        curl, "--silent", "--show-error", "--fail-with-body", "--aws-sigv4", f"aws:amz:{REGION}:s3",
        "--user", f"{node.keys.access_key}:{node.keys.secret_key}",
        "--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD", f"{node.s3_url}/clients/curl/frames",
    )  # fmt: skip
    run(*base, "--upload-file", str(hundred_mb))
    run(*base, "--output", str(back))
    assert same(hundred_mb, back)


def test_s3cmd(node: DemoNode, hundred_mb: Path, peer: Peer, tmp_path: Path) -> None:
    s3cmd, back = peer("s3cmd"), tmp_path / "back"
    host = node.s3_url.removeprefix("http://")
    config = tmp_path / "s3cfg"
    config.write_text(
        f"[default]\naccess_key = {node.keys.access_key}\nsecret_key = {node.keys.secret_key}\n"
        f"host_base = {host}\nhost_bucket = {host}\nuse_https = False\n"
    )
    base = (s3cmd, f"--config={config}", "--no-progress")
    run(*base, "put", str(hundred_mb), "s3://clients/s3cmd/frames")
    run(*base, "get", "s3://clients/s3cmd/frames", str(back))
    assert same(hundred_mb, back)
