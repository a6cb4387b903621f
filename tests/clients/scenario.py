"""What every client has to do, each step against what the node itself then says. The steps, in the order they run.

A step takes an adapter and ``Stage``: files to send, and the node asked without any client (``seen``).
"""

from __future__ import annotations

import dataclasses
import filecmp
from collections.abc import Callable
from email.header import decode_header
from pathlib import Path

import httpx

from tests.clients.adapters.base import Adapter
from tests.clients.node import ClientNode

ODD_KEY = "odd/a b+%&?#ü漢.raw"
METADATA = "grün 漢"
RANGE_FIRST, RANGE_COUNT = 70_001, 100_003
LISTED = 2500


@dataclasses.dataclass(frozen=True)
class Stage:
    node: ClientNode
    folder: Path
    text: Path
    """Some hundred KB of printable bytes."""
    large: Path
    """100 MB."""
    empty: Path

    def holds(self, adapter: Adapter, key: str, file: Path) -> httpx.Headers:
        """The node has exactly this file under exactly this key; returns the headers of its answer."""
        answer = self.node.s3("GET", adapter.service.bucket, key)
        assert answer.status_code == 200, answer.text
        assert answer.content == file.read_bytes()
        return answer.headers

    def returned(self, adapter: Adapter, key: str, file: Path) -> None:
        """The client reads exactly this file."""
        back = self.folder / "back"
        back.unlink(missing_ok=True)
        adapter.get(key, back)
        assert filecmp.cmp(file, back, shallow=False)
        back.unlink()


def round_trip(adapter: Adapter, stage: Stage) -> None:
    """Put, get, delete."""
    key = f"{adapter.name}/round-trip"
    adapter.put(key, stage.text)
    stage.holds(adapter, key, stage.text)
    stage.returned(adapter, key, stage.text)
    adapter.delete(key)
    assert stage.node.s3("HEAD", adapter.service.bucket, key).status_code == 404


def ranged_get(adapter: Adapter, stage: Stage) -> None:
    key = f"{adapter.name}/range"
    stage.node.put(adapter.service.bucket, key, stage.text.read_bytes())
    expected = stage.text.read_bytes()[RANGE_FIRST : RANGE_FIRST + RANGE_COUNT]
    assert adapter.get_range(key, RANGE_FIRST, RANGE_COUNT) == expected


def large_object(adapter: Adapter, stage: Stage) -> None:
    """100 MB up, in parts where the client knows them, and down as it likes."""
    key = f"{adapter.name}/large"
    adapter.put_large(key, stage.large)
    headers = stage.node.s3("HEAD", adapter.service.bucket, key).headers
    assert int(headers["content-length"]) == stage.large.stat().st_size
    assert (int(headers["etag"].strip('"').partition("-")[2]) > 1) is not bool(adapter.one_put)
    stage.returned(adapter, key, stage.large)
    stage.node.s3("DELETE", adapter.service.bucket, key)


def listing(adapter: Adapter, stage: Stage) -> None:
    """More keys than a page holds."""
    assert sorted(adapter.keys()) == stage.node.many_keys


def copy(adapter: Adapter, stage: Stage) -> None:
    source, target = f"{adapter.name}/source", f"{adapter.name}/copy"
    stage.node.put(adapter.service.bucket, source, stage.text.read_bytes())
    adapter.copy(source, target)
    stage.holds(adapter, target, stage.text)


def presign(adapter: Adapter, stage: Stage) -> None:
    key = f"{adapter.name}/signed"
    stage.node.put(adapter.service.bucket, key, stage.text.read_bytes())
    answer = stage.node.http.get(adapter.presign(key))
    assert answer.status_code == 200, answer.text
    assert answer.content == stage.text.read_bytes()


def metadata(adapter: Adapter, stage: Stage) -> None:
    """A value beyond ASCII: it comes back as it was sent, and says what was meant."""
    key = f"{adapter.name}/metadata"
    spelled = adapter.spell(METADATA)
    adapter.put(key, stage.text, {"sample": spelled})
    assert adapter.metadata(key)["sample"] == spelled
    stored = stage.holds(adapter, key, stage.text).raw
    value = next(value for name, value in stored if name.lower() == b"x-amz-meta-sample").decode()
    words = [
        word.decode(charset or "utf-8") if isinstance(word, bytes) else word for word, charset in decode_header(value)
    ]
    assert "".join(words) == METADATA


def empty_object(adapter: Adapter, stage: Stage) -> None:
    key = f"{adapter.name}/empty"
    adapter.put(key, stage.empty)
    stage.holds(adapter, key, stage.empty)
    stage.returned(adapter, key, stage.empty)


def odd_key(adapter: Adapter, stage: Stage) -> None:
    """A key of everything that URLs, query strings and XML treat specially."""
    key = f"{adapter.name}/{ODD_KEY}"
    adapter.put(key, stage.text)
    stage.holds(adapter, key, stage.text)
    stage.returned(adapter, key, stage.text)
    adapter.delete(key)
    assert stage.node.s3("HEAD", adapter.service.bucket, key).status_code == 404


STEPS: tuple[Callable[[Adapter, Stage], None], ...] = (
    round_trip, ranged_get, large_object, listing, copy, presign, metadata, empty_object, odd_key,
)  # fmt: skip
