"""A whole node with a virtual clock: rules move and expire objects, restores come and go, webhooks hear of it. Nobody sleeps."""

from __future__ import annotations

import http.server
import json
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from ingest import clock
from ingest.paths import NodePaths

DAY_S = 86400
WAIT_S = 60.0


class Webhook:
    """A receiver in a thread; refuses the first request, as a receiver that is just being started."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.answers = iter([503])
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status = next(hook.answers, 200)
                if status == 200:
                    hook.events += [
                        (record["eventName"], record["s3"]["object"]["key"]) for record in body.get("Records", ())
                    ]
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def hook() -> Iterator[Webhook]:
    hook = Webhook()
    yield hook
    hook.close()


@pytest.fixture(scope="module")
def node(start_node: Callable[..., Any], hook: Webhook) -> Any:
    sets = ("virtual_clock=on", "lifecycle_scan_s=0.1", f"notification_endpoints=lab={hook.url}", "kernels=off")
    return start_node(*(flag for setting in sets for flag in ("--set", setting)))


def client_of(node: Any) -> Any:
    keys = node.keys()
    return boto3.client(
        "s3",
        endpoint_url=node.url("s3"),
        aws_access_key_id=keys["access_key"],
        aws_secret_access_key=keys["secret_key"],
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


@pytest.fixture(scope="module")
def s3(node: Any) -> Iterator[Any]:
    client = client_of(node)
    yield client
    client.close()


def code(call: Callable[..., Any], **arguments: Any) -> str:
    """The error's code; "" for an answer."""
    try:
        answer = call(**arguments)
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    if "Body" in answer:
        answer["Body"].read()
    return ""


def test_the_life_of_a_run(node: Any, s3: Any, hook: Webhook, poll: Callable[..., Any]) -> None:
    paths = NodePaths(node.data_dir)
    s3.create_bucket(Bucket="scans")
    queue = {
        "Id": "all",
        "QueueArn": "arn:hiss:sqs:::lab",
        "Events": ["s3:ObjectCreated:*", "s3:ObjectRestore:*", "s3:LifecycleExpiration:*", "s3:LifecycleTransition"],
    }
    s3.put_bucket_notification_configuration(Bucket="scans", NotificationConfiguration={"QueueConfigurations": [queue]})
    rules = [
        {"ID": "cold", "Filter": {"Prefix": "raw/"}, "Status": "Enabled",
         "Transitions": [{"Days": 10, "StorageClass": "GLACIER"}], "Expiration": {"Days": 40}},
    ]  # fmt: skip
    s3.put_bucket_lifecycle_configuration(Bucket="scans", LifecycleConfiguration={"Rules": rules})
    body = b"frames" * 100_000
    of = {"Bucket": "scans", "Key": "raw/1"}
    assert s3.put_object(**of, Body=body)["Expiration"].endswith('rule-id="cold"')
    s3.put_object(Bucket="scans", Key="kept", Body=b"x")

    clock.advance(paths, 11 * DAY_S)
    poll(lambda: s3.head_object(**of).get("StorageClass") == "GLACIER", "the object moved", WAIT_S)
    assert code(s3.get_object, **of) == "InvalidObjectState"

    def evicted() -> bool:
        return int(json.loads(node.hiss("drain", "--json").stdout)["evicted_bytes"]) >= len(body)

    poll(evicted, "the buffered copy is gone", WAIT_S)
    s3.restore_object(**of, RestoreRequest={"Days": 3})
    poll(lambda: 'ongoing-request="false"' in s3.head_object(**of).get("Restore", ""), "it is restored", WAIT_S)
    answer = s3.get_object(**of)
    assert answer["Body"].read() == body
    clock.advance(paths, 5 * DAY_S)
    assert code(s3.get_object, **of) == "InvalidObjectState"

    assert node.stop() == 0
    node.again()
    again = client_of(node)
    clock.advance(paths, 30 * DAY_S)
    poll(lambda: code(again.head_object, **of) == "404", "the object expired", WAIT_S)
    assert code(again.get_object, Bucket="scans", Key="kept") == ""
    told = [
        ("ObjectCreated:Put", "raw/1"),
        ("ObjectCreated:Put", "kept"),
        ("LifecycleTransition", "raw/1"),
        ("ObjectRestore:Post", "raw/1"),
        ("ObjectRestore:Completed", "raw/1"),
        ("LifecycleExpiration:Delete", "raw/1"),
    ]
    poll(lambda: len(hook.events) >= len(told), "the webhook heard of all", WAIT_S)
    assert hook.events == told
    again.close()


def test_a_restored_copy_expires_while_it_is_read(start_node: Callable[..., Any], poll: Callable[..., Any]) -> None:
    """Whoever reads has begun with bytes of a segment that is given back and written anew meanwhile: they go on being those."""
    sets = ("virtual_clock=on", "lifecycle_scan_s=0.1", "kernels=off", "buffer_bytes=1GiB", "segment_bytes=64MiB")
    node = start_node(*(flag for setting in sets for flag in ("--set", setting)))
    paths, s3 = NodePaths(node.data_dir), client_of(node)
    s3.create_bucket(Bucket="cold")
    of = {"Bucket": "cold", "Key": "film"}
    body = random.Random(1).randbytes(48 << 20)
    s3.put_object(**of, Body=body, StorageClass="GLACIER")

    def evicted() -> bool:
        return int(json.loads(node.hiss("drain", "--json").stdout)["evicted_bytes"]) >= len(body)

    poll(evicted, "it is in the archive only", WAIT_S)
    s3.restore_object(**of, RestoreRequest={"Days": 1})
    poll(lambda: 'ongoing-request="false"' in s3.head_object(**of).get("Restore", ""), "it is restored", WAIT_S)
    reading = s3.get_object(**of)["Body"]
    begun = reading.read(1 << 20)
    clock.advance(paths, 3 * DAY_S)
    assert code(s3.get_object, **of) == "InvalidObjectState"
    poll(evicted, "the restored copy is gone", WAIT_S)
    for number in range(12):  # whatever room was given back is written again
        s3.put_object(Bucket="cold", Key=f"other/{number}", Body=bytes([number]) * (40 << 20))
    assert begun + reading.read() == body
    s3.close()
    assert node.stop() == 0
