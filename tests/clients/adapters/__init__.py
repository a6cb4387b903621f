"""One thin adapter for each S3 client: how it does what ``tests/clients/scenario.py`` asks for, what it cannot do and why."""

from __future__ import annotations

from tests.clients.adapters.aws_cli import AwsCliV1, AwsCliV2
from tests.clients.adapters.base import Adapter, Service
from tests.clients.adapters.boto import Boto3, Boto3Crt
from tests.clients.adapters.curl import Curl
from tests.clients.adapters.davix import Davix
from tests.clients.adapters.fuse import S3fsFuse
from tests.clients.adapters.javascript import JavaScript
from tests.clients.adapters.libs3 import Libs3
from tests.clients.adapters.python import MinioPy, Obstore, S3fs
from tests.clients.adapters.rclone import Rclone
from tests.clients.adapters.s3cmd import S3cmd
from tests.clients.adapters.s5cmd import S5cmd

ADAPTERS: tuple[type[Adapter], ...] = (
    Boto3, Boto3Crt, AwsCliV1, AwsCliV2, S5cmd, Rclone, S3cmd, MinioPy, Obstore, S3fs, JavaScript, Libs3, Davix, S3fsFuse, Curl,
)  # fmt: skip

__all__ = ["ADAPTERS", "Adapter", "Service"]
