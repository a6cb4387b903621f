"""The wrong scheme for a port: each side hears what is wrong, and nobody hangs."""

from __future__ import annotations

import boto3
import botocore.config
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.clients.adapters import Service
from tests.clients.adapters.base import REGION


def _client(service: Service, scheme: str):
    return boto3.client(
        "s3",
        endpoint_url=f"{scheme}://{service.netloc}",
        region_name=REGION,
        aws_access_key_id=service.access_key,
        aws_secret_access_key=service.secret_key,
        verify=False,
        config=botocore.config.Config(retries={"max_attempts": 1}, read_timeout=20),
    )


@pytest.mark.parametrize("node", ["https"], indirect=True)
def test_http_on_the_port_for_tls_is_told_to_use_https(service: Service) -> None:
    client = _client(service, "http")
    with pytest.raises(ClientError) as refused:
        client.list_buckets()
    client.close()
    error = refused.value.response["Error"]
    assert (error["Code"], error["Message"]) == ("InvalidRequest", "This port speaks TLS: use https://.")


@pytest.mark.parametrize("node", ["http"], indirect=True)
def test_tls_on_the_port_for_http_ends_at_once(service: Service) -> None:
    """The answer is no TLS, which is what every TLS library says then."""
    client = _client(service, "https")
    with pytest.raises(BotoCoreError, match=r"WRONG_VERSION_NUMBER|wrong version number"):
        client.list_buckets()
    client.close()
