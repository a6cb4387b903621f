"""``hiss reserve`` and ``/v1/reservations`` on a real node: made, listed, extended, released, refused with what would fit."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import select
import time
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import httpx
import pytest

from gateway.cli.output import CliError
from gateway.cli.quantities import parse_duration, parse_rate, parse_size, parse_time

NOW = datetime.datetime(2026, 12, 1, 10, 0, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("20TB", 20 * 10**12), ("1.5 TiB", 3 << 39), ("0", 0), ("7", 7), ("512 MiB", 512 << 20)]
)
def test_sizes_as_people_write_them(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "rate_bytes_per_s"),
    [("20Gbps", 2_500_000_000), ("2.5GB/s", 2_500_000_000), ("800 Mbit/s", 10**8), ("1GiB/s", 1 << 30), ("8bps", 1)],
)
def test_a_small_b_is_a_bit(text: str, rate_bytes_per_s: int) -> None:
    assert parse_rate(text) == rate_bytes_per_s


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("now", NOW),
        ("+8h", NOW + datetime.timedelta(hours=8)),
        ("2026-12-02T08:00Z", datetime.datetime(2026, 12, 2, 8, tzinfo=datetime.UTC)),
        ("2026-12-02 08:00+02:00", datetime.datetime(2026, 12, 2, 6, tzinfo=datetime.UTC)),
        ("2026-12-02 08:00", datetime.datetime(2026, 12, 2, 8).astimezone()),
    ],
)
def test_times_as_people_write_them(text: str, moment: datetime.datetime) -> None:
    assert parse_time(text, NOW) == moment


def test_a_time_of_day_is_the_next_one() -> None:
    later = parse_time("12:30", NOW)
    assert NOW < later <= NOW + datetime.timedelta(days=1)
    assert (later.astimezone().hour, later.astimezone().minute) == (12, 30)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_size, "many"),
        (parse_rate, "20"),
        (parse_rate, "20 TB"),
        (parse_duration, "soon"),
        (lambda text: parse_time(text, NOW), "25:00"),
        (lambda text: parse_time(text, NOW), "tomorrow"),
    ],
)
def test_what_cannot_be_read_says_its_form(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(CliError, match=text):
        parse(text)


@pytest.fixture(scope="module")
def node(start_node: Callable[..., Any]) -> Iterator[Any]:
    node = start_node("--set", "kernels=off", "--set", "ingest_bytes_per_s=1GB")
    s3 = _s3(node)
    for bucket in ("scan-a", "scan-b", "scan-c"):
        s3.create_bucket(Bucket=bucket)
    yield node
    s3.close()
    _clients.clear()


_clients: dict[str, Any] = {}


def _s3(node: Any) -> Any:
    """One for the node."""
    url = node.url("s3")
    if url not in _clients:
        _clients[url] = _client(node)
    return _clients[url]


def _client(node: Any) -> Any:
    keys = node.keys()
    return boto3.client(
        "s3",
        endpoint_url=node.url("s3"),
        aws_access_key_id=keys["access_key"],
        aws_secret_access_key=keys["secret_key"],
        region_name="us-east-1",
    )


def _api(node: Any) -> httpx.Client:
    keys = node.keys()
    return httpx.Client(base_url=node.url("control"), auth=(keys["access_key"], keys["secret_key"]), timeout=60)


def test_an_operator_reserves_lists_extends_and_releases(node: Any, here: Callable[..., Any]) -> None:
    at = ("--data", str(node.data_dir))
    begins = "2031-05-06T08:00Z"
    wanted = ("--capacity", "600MB", "--rate", "4Gbps", "--from", begins, "--until", "+8h")
    made = here("reserve", "scan-a", *wanted, *at, "--json").json
    assert (made["bucket"], made["state"], made["capacity_bytes"]) == ("scan-a", "planned", 600_000_000)
    assert made["nodes"] == [
        {"node": 0, "capacity_bytes": 600_000_000, "rate_bytes_per_s": 500_000_000, "used_bytes": 0}
    ]
    assert made["until"] == "2031-05-06T16:00:00Z"

    refused = here("reserve", "scan-b", *wanted, *at)
    assert refused.code == 2
    assert "366.4 MB and 4 Gbps are free over the whole time" in refused.err
    assert "it fits from 2031-05-06T16:00:00Z on" in refused.err

    longer = here("reserve", "extend", made["id"], "--until", "+2h", *at, "--json").json
    assert longer["until"] == "2031-05-06T18:00:00Z"

    calendar = here("reserve", "list", *at, "--json").json
    assert [one["id"] for one in calendar["reservations"]] == [made["id"]]
    (busy,) = (step for step in calendar["free"] if step["from"] == "2031-05-06T08:00:00Z")
    assert (busy["until"], busy["rate_bytes_per_s"]) == ("2031-05-06T18:00:00Z", 500_000_000)
    table = here("reserve", "list", *at).out
    assert "scan-a" in table
    assert "free from" in table

    released = here("reserve", "release", made["id"], *at, "--json").json
    assert released["state"] == "released"
    assert here("reserve", "list", *at, "--json").json["reservations"] == []
    assert here("reserve", "list", "--ended", *at, "--json").json["reservations"][0]["id"] == made["id"]
    assert here("reserve", "show", made["id"], *at, "--json").json == released
    assert "released" in here("reserve", "show", made["id"], *at).out


def test_mistakes_are_one_line(node: Any, here: Callable[..., Any]) -> None:
    at = ("--data", str(node.data_dir))
    for arguments, complaint in (
        (("no-such-bucket", "--rate", "1Gbps", "--until", "+1h"), "there is no such bucket"),
        (("scan-a", "--until", "+1h"), "neither capacity nor rate"),
        (("scan-a", "--rate", "1Gbps", "--until", "2020-01-01"), "is not after"),
        (("show", "nobody"), "there is no such reservation"),
    ):
        done = here("reserve", *arguments, *at)
        assert (done.code, len(done.err.splitlines())) == (2, 1)
        assert complaint in done.err


def test_the_api_describes_itself_and_asks_for_an_operator(node: Any) -> None:
    with _api(node) as api:
        paths = api.get("/openapi.json").json()["paths"]
        assert set(paths["/v1/reservations"]) == {"get", "post"}
        assert set(paths["/v1/reservations/{reservation_id}"]) == {"get", "delete"}
        wanted = {
            "id": "night-1",
            "bucket": "scan-c",
            "rate_bytes_per_s": 10**6,
            "from": "2031-06-01T20:00:00Z",
            "until": "2031-06-02T06:00:00+00:00",
        }
        first = api.post("/v1/reservations", json=wanted)
        assert (first.status_code, first.json()["id"]) == (201, "night-1")
        assert api.post("/v1/reservations", json=wanted).json() == first.json()
        assert api.post("/v1/reservations", json=wanted | {"bucket": "scan-b"}).status_code == 409
        assert api.post("/v1/reservations", json=wanted | {"until": "2031-06-02T06:00:00"}).status_code == 422
        assert api.post("/v1/reservations", json=wanted | {"colour": "red"}).status_code == 422
        assert api.post("/v1/reservations", json=wanted | {"rate_bytes_per_s": 10**6 + 1}).status_code == 409
        for wrong in (
            {"capacity_bytes": 2**64}, {"rate_bytes_per_s": 2**63}, {"until": "9999-12-31T00:00:00Z"},
            {"from": "0001-01-01T00:00:00Z"}, {"bucket": "../users"},
        ):  # fmt: skip
            assert api.post("/v1/reservations", json=wanted | {"id": ""} | wrong).status_code == 422, wrong
        for body in (b"NaN", b'{"capacity_bytes": NaN}', rb'{"bucket": "\ud800abc", "\ud800": 1}'):
            odd = api.post("/v1/reservations", content=body, headers={"content-type": "application/json"})
            assert odd.status_code == 422, (body, odd.text)
        busy = wanted | {"id": "", "bucket": "scan-b", "rate_bytes_per_s": 10**9}
        refused = api.post("/v1/reservations", json=busy)
        assert refused.status_code == 409
        assert "7.992 Gbps are free" in refused.json()["detail"]
        with httpx.Client(base_url=node.url("control")) as nobody:
            assert nobody.post("/v1/reservations", json=wanted).status_code == 401
            assert nobody.get("/v1/reservations").status_code == 401
        assert api.delete("/v1/reservations/night-1").json()["state"] == "released"


def test_a_user_of_one_bucket_sees_when_and_not_whose(node: Any) -> None:
    keys = json.loads(node.hiss("user", "add", "guest", "--grant", "write:scan-b", "--json").stdout)
    with _api(node) as api:
        wanted = {"bucket": "scan-c", "rate_bytes_per_s": 10**6, "until": "2031-06-02T06:00:00Z"}
        made_id = api.post("/v1/reservations", json=wanted).json()["id"]
    credentials = (keys["access_key"], keys["secret_key"])
    with httpx.Client(base_url=node.url("control"), auth=credentials, timeout=60) as guest:
        (seen,) = guest.get("/v1/reservations").json()["reservations"]
        assert (seen["id"], seen["bucket"], seen["owner"], seen["state"]) == (made_id, None, None, "active")
        assert guest.post("/v1/reservations", json=wanted).status_code == 403
        assert guest.delete(f"/v1/reservations/{made_id}").status_code == 403
    with _api(node) as api:
        api.delete(f"/v1/reservations/{made_id}")


# -- what a slot is worth


def _reserve(node: Any, bucket: str, **wanted: Any) -> str:
    until = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)).isoformat()
    with _api(node) as api:
        made = api.post("/v1/reservations", json={"bucket": bucket, "until": until} | wanted)
        assert made.status_code == 201, made.text
        return str(made.json()["id"])


def _release(node: Any, reservation: str) -> None:
    with _api(node) as api:
        assert api.delete(f"/v1/reservations/{reservation}").status_code == 200


def _described(node: Any, reservation: str) -> dict[str, Any]:
    with _api(node) as api:
        return dict(api.get(f"/v1/reservations/{reservation}").json())


def _metric(node: Any, name: str) -> float:
    lines = httpx.get(node.url("control") + "/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split(" ")[0].split("{")[0] == name)


def _only_a_head(node: Any, bucket: str, length: int | None) -> http.client.HTTPConnection:
    """A PUT whose body was announced and not sent."""
    url = _s3(node).generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": "announced"})
    connection = http.client.HTTPConnection("127.0.0.1", node.ports()["s3"], timeout=60)
    connection.putrequest("PUT", url.split(str(node.ports()["s3"]), 1)[1])
    if length is None:
        connection.putheader("Transfer-Encoding", "chunked")
    else:
        connection.putheader("Content-Length", str(length))
    connection.endheaders()
    return connection


def _refused(node: Any, bucket: str, length: int) -> tuple[int, str]:
    """(Retry-After, text) of the 503 that answers a PUT before its body."""
    connection = _only_a_head(node, bucket, length)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert answer.status == 503
    return int(answer.headers["Retry-After"]), text


def _keep(node: Any, bucket: str, **settings: str) -> None:
    """The bucket's data stay in the buffer."""
    tags = {"hiss.drain-after-s": "86400"} | settings
    rows = [{"Key": name, "Value": value} for name, value in tags.items()]
    _s3(node).put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": rows})


@pytest.fixture
def clean(node: Any) -> Iterator[Any]:
    yield node
    s3 = _s3(node)
    for bucket in ("scan-a", "scan-b", "scan-c"):
        for one in s3.list_objects_v2(Bucket=bucket).get("Contents", ()):
            s3.delete_object(Bucket=bucket, Key=one["Key"])
    with _api(node) as api:
        for one in api.get("/v1/reservations").json()["reservations"]:
            api.delete(f"/v1/reservations/{one['id']}")


def test_capacity_is_refused_before_the_body_and_comes_back(clean: Any) -> None:
    s3 = _s3(clean)
    _keep(clean, "scan-a")
    reservation = _reserve(clean, "scan-a", capacity_bytes=30 << 20)
    for number in range(2):
        s3.put_object(Bucket="scan-a", Key=f"{number}", Body=bytes(12 << 20))
    used = _described(clean, reservation)["used_bytes"]
    assert 24 << 20 < used < 25 << 20

    refusals = _metric(clean, "hiss_reservation_refused_total")
    after_s, text = _refused(clean, "scan-a", 12 << 20)
    assert after_s == 10
    assert "<Code>SlowDown</Code>" in text
    assert f"reservation {reservation} of bucket scan-a has" in text
    assert _metric(clean, "hiss_reservation_refused_total") == refusals + 1
    # What could never fit is not asked for again before the slot is over.
    assert 3500 < _refused(clean, "scan-a", 40 << 20)[0] <= 3600
    # The others are not concerned, and what is deleted is free again.
    s3.put_object(Bucket="scan-b", Key="else", Body=bytes(12 << 20))
    s3.delete_object(Bucket="scan-a", Key="0")
    s3.put_object(Bucket="scan-a", Key="2", Body=bytes(12 << 20))
    assert _described(clean, reservation)["used_bytes"] == used
    # Released, the bucket is one of many.
    _release(clean, reservation)
    s3.put_object(Bucket="scan-a", Key="3", Body=bytes(12 << 20))


def test_bodies_that_are_let_in_count_before_they_are_committed(clean: Any) -> None:
    _keep(clean, "scan-a")
    _reserve(clean, "scan-a", capacity_bytes=30 << 20)
    waiting = [_only_a_head(clean, "scan-a", 12 << 20) for _ in range(3)]
    answered, _, _ = select.select([connection.sock for connection in waiting], [], [], 60)
    (refused,) = [connection for connection in waiting if connection.sock in answered]
    answer = refused.getresponse()
    assert (answer.status, b"<Code>SlowDown</Code>" in answer.read()) == (503, True)
    for connection in waiting:
        connection.close()
    # They are gone, and nothing of them is left.
    s3 = _s3(clean)
    for number in range(2):
        s3.put_object(Bucket="scan-a", Key=f"{number}", Body=bytes(12 << 20))


def test_a_body_of_unknown_length_is_cut_at_the_limit(clean: Any) -> None:
    _keep(clean, "scan-a")
    reservation = _reserve(clean, "scan-a", capacity_bytes=100 << 20)
    connection = _only_a_head(clean, "scan-a", None)
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 200 << 20 and not select.select([connection.sock], [], [], 0)[0]:
            connection.send(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            sent += 1 << 20
    with contextlib.closing(connection), contextlib.suppress(ConnectionError):  # who sends on may not get to read it
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.headers["Retry-After"]) == (503, "10")
    assert sent < 200 << 20
    assert _described(clean, reservation)["used_bytes"] == 0


def test_others_leave_what_is_reserved_and_not_used_yet(clean: Any) -> None:
    s3 = _s3(clean)
    for bucket in ("scan-a", "scan-b"):
        _keep(clean, bucket)
    reservation = _reserve(clean, "scan-a", capacity_bytes=800 << 20)
    until_held = time.monotonic() + 60
    while _metric(clean, "hiss_reserved_capacity_bytes") < 800 << 20:
        assert time.monotonic() < until_held
    _refused(clean, "scan-b", 400 << 20)
    s3.put_object(Bucket="scan-a", Key="mine", Body=bytes(400 << 20))
    assert _described(clean, reservation)["used_bytes"] > 400 << 20
    _release(clean, reservation)
    while _metric(clean, "hiss_reservations_active"):
        assert time.monotonic() < until_held
    s3.put_object(Bucket="scan-b", Key="theirs", Body=bytes(300 << 20))


def test_a_bucket_may_take_data_in_its_slots_only(clean: Any) -> None:
    s3 = _s3(clean)
    _keep(clean, "scan-c", **{"hiss.outside-slot": "refuse"})
    assert _refused(clean, "scan-c", 10)[0] == 3600
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=10)
    end = (later + datetime.timedelta(hours=1)).isoformat()
    planned = _reserve(clean, "scan-c", rate_bytes_per_s=10**6, until=end, **{"from": later.isoformat()})
    after_s, text = _refused(clean, "scan-c", 10)
    assert 500 < after_s <= 600
    assert "the next one begins at" in text
    _release(clean, planned)
    _reserve(clean, "scan-c", rate_bytes_per_s=10**6)
    s3.put_object(Bucket="scan-c", Key="now", Body=b"0123456789")
    _keep(clean, "scan-c", **{"hiss.outside-slot": "default"})
