"""``hiss kernel watch``: what a kernel says and finds, while frames arrive.

In: the feedback stream, and the newest product of the kernel (of a run while it goes on, refreshed by the node about once a
second). Out: on a terminal one page that is drawn anew, else a line for each change, or JSON lines. Ctrl-C ends it: exit
code 0.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import select
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli import node, options
from gateway.cli.kernel.change import Place
from gateway.cli.kernel.follow import Follower, Pulse, clock_text
from gateway.cli.kernel.state import place
from gateway.cli.output import CliError, console, print_json
from gateway.cli.s3 import S3, Missing

if TYPE_CHECKING:
    from kernels.recorded import Recorded

LIST_EVERY_S = 3.0
PRODUCTS_LISTED_MAX = 5000
PRODUCT_BYTES_MAX = 256 << 20
LINES_KEPT = 8


def watch(
    kernel: Place,
    run: Annotated[str, typer.Option("--run", help="A run's key prefix; default: the newest product.")] = "",
    key_prefix: Annotated[str, typer.Option("--keys", help="Feedback about keys under this prefix only.")] = "",
    every: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between two looks.")] = 1.0,
    seconds: Annotated[float, typer.Option("--for", min=0, help="End after so long; 0: at Ctrl-C.")] = 0.0,
    endpoint: options.Endpoint = "",
    data: options.Data = None,
    control: options.Control = "",
    access_key: options.AccessKey = "",
    ca: options.CaFile = None,
    as_json: options.Json = False,
) -> None:
    """Follow a kernel's feedback and its newest product until Ctrl-C."""
    bucket, name = place(kernel)
    found = node.find(data, control=control, endpoint=endpoint, access_key=access_key, ca=ca)
    follower = Follower(found, bucket, name, key_prefix)
    with S3(found) as s3:
        page = Page(bucket, name, follower, Newest(s3, bucket, name, run))
        follower.start()
        try:
            with contextlib.suppress(KeyboardInterrupt), _screen(as_json) as show, Interrupt() as interrupt:
                _watch(page, show, interrupt, every, time.monotonic() + seconds if seconds else None)
        finally:
            follower.close()


class Interrupt:
    """Ctrl-C as something to wait for. As an exception it would be lost where it happens to meet a callback of a C library
    (a product that is being read); the second one is an exception."""

    def __enter__(self) -> Interrupt:
        self._heard, self._tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        os.close(self._heard)
        os.close(self._tell)

    def _note(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(self._tell, b"C")

    def wait(self, timeout_s: float) -> bool:
        """Whether it came, as soon as it has."""
        return bool(select.select([self._heard], [], [], timeout_s)[0])


def _watch(page: Page, show: Any, interrupt: Interrupt, every: float, end_s: float | None) -> None:
    while True:
        page.look(time.time())
        if page.follower.error:
            raise CliError(page.follower.error)
        show(page)
        if end_s is not None and time.monotonic() >= end_s:
            return
        if interrupt.wait(every):
            return


class Newest:
    """The product to look at: of the run that is named, else the one that changed last."""

    def __init__(self, s3: S3, bucket: str, kernel: str, run: str) -> None:
        self._s3 = s3
        self._bucket = bucket
        self._prefix = f"_products/{kernel}/"
        folder = run if not run or run.endswith("/") else run + "/"
        self._key = f"{self._prefix}{folder}_run.nxs".encode() if run else b""
        self._named = bool(run)
        self._etag = ""
        self._listed_s = -LIST_EVERY_S
        self.key = ""
        self.product: Recorded | None = None

    def look(self, now_s: float) -> bool:
        """Fetch it if it has changed; whether it has."""
        from kernels.recorded import NotAProduct, read

        if not self._named and now_s - self._listed_s >= LIST_EVERY_S:
            self._listed_s = now_s
            rows = self._s3.list(self._bucket, self._prefix, most=PRODUCTS_LISTED_MAX)
            if rows:
                # Within one second a run's product is the one to see.
                self._key = max(rows, key=lambda row: (row.modified, row.key.endswith(b"/_run.nxs"), row.key)).key
        if not self._key:
            return False
        try:
            head = self._s3.head(self._bucket, self._key)
            if (shown := self._key.decode("utf-8", "backslashreplace")) == self.key and head.etag == self._etag:
                return False
            body = self._s3.get(self._bucket, self._key, most_bytes=PRODUCT_BYTES_MAX).body
            self.product = read(body)
        except (Missing, NotAProduct):
            return False
        self.key, self._etag = shown, head.etag
        return True


@dataclasses.dataclass(slots=True)
class Page:
    """What there is to show."""

    bucket: str
    kernel: str
    follower: Follower
    newest: Newest
    pulse: Pulse = dataclasses.field(default_factory=Pulse)
    events: int = 0
    by_code: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    last: collections.deque[dict[str, Any]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=LINES_KEPT)
    )
    fresh: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    changed: bool = False
    now_s: float = 0.0
    frames_per_s: float = 0.0
    _frames: tuple[str, int, float] = ("", 0, 0.0)

    def look(self, now_s: float) -> None:
        self.now_s = now_s
        self.fresh = self.follower.take()
        self.events += len(self.fresh)
        self.by_code.update(event["code"] for event in self.fresh)
        self.last.extend(self.fresh)
        for event in self.fresh:
            self.pulse.add(1, event["time_ns"] / 1e9)
        newer = self.newest.look(now_s)
        if newer:
            self._count_frames(now_s)
        self.changed = bool(self.fresh) or newer

    def _count_frames(self, now_s: float) -> None:
        assert self.newest.product is not None
        frames = self.newest.product.counts.get("received", 0)
        key, before, then_s = self._frames
        if key == self.newest.key and frames >= before and now_s > then_s:
            self.frames_per_s = (frames - before) / (now_s - then_s)
        self._frames = (self.newest.key, frames, now_s)

    def document(self) -> dict[str, Any]:
        """For --json."""
        product = self.newest.product
        return {
            "kernel": f"{self.bucket}/{self.kernel}",
            "time_s": round(self.now_s, 3),
            "connected": self.follower.connected.is_set(),
            "events": self.events,
            "events_lost": self.follower.lost,
            "reconnections": self.follower.reconnections,
            "by_code": {str(code): count for code, count in sorted(self.by_code.items())},
            "fresh": self.fresh,
            "product": None if product is None else {
                "key": self.newest.key,
                "error": product.error,
                "counts": dict(product.counts),
                "run": {name: value for name, value in product.about_run.items() if name in ("status", "members", "pending")},
                "frames_per_s": round(self.frames_per_s, 2),
            },
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """A page for the terminal."""
        state = "" if self.follower.connected.is_set() else " (not connected, trying again)"
        yield f"kernel {self.kernel} of {self.bucket}{state}"
        codes = ", ".join(f"code {code}: {count}" for code, count in sorted(self.by_code.items()))
        lost = f", {self.follower.lost} lost" if self.follower.lost else ""
        yield f"feedback {self.events} events{lost}, {self.pulse.rate(self.now_s):.1f}/s  {codes}"
        yield self.pulse.sparkline(self.now_s)
        for event in self.last:
            yield _event_line(event)
        yield ""
        yield from self._product_lines()

    def _product_lines(self) -> Iterator[str]:
        from gateway.cli.kernel import plots

        product = self.newest.product
        if product is None:
            yield "no product yet"
            return
        yield summary(self.newest.key, product, self.frames_per_s)
        if product.plot is not None:
            yield plots.text(*product.plot)


def summary(key: str, product: Recorded, frames_per_s: float) -> str:
    """One line about a product."""
    if product.error:
        return f"{key}: {product.error}"
    counts = ", ".join(
        f"{name} {count}" for name, count in product.counts.items() if count and name != "feedback_events"
    )
    status = f", run {product.about_run['status']}" if "status" in product.about_run else ""
    rate = f", {frames_per_s:.1f} frames/s" if frames_per_s else ""
    return f"{key}: {counts or 'no frames'}{rate}{status}"


def _event_line(event: dict[str, Any]) -> str:
    return (
        f"{clock_text(event['time_ns'])}  code {event['code']}  value {event['value']:g}  "
        f"frame {event['frame']} of {event['key']}"
    )


@contextlib.contextmanager
def _screen(as_json: bool) -> Iterator[Any]:
    """How a page is shown: drawn anew on a terminal, else what is new as lines."""
    screen = console()
    if as_json:
        yield lambda page: print_json(page.document()) if page.changed else None
        return
    if not screen.is_terminal:
        yield _print_changes
        return
    from rich.live import Live
    from rich.text import Text

    with Live(console=screen, auto_refresh=False, screen=False, vertical_overflow="crop") as live:
        yield lambda page: live.update(Text("\n".join(page.lines())), refresh=True)


def _print_changes(page: Page) -> None:
    for event in page.fresh:
        print(_event_line(event), flush=True)
    if page.changed and page.newest.product is not None:
        print(summary(page.newest.key, page.newest.product, page.frames_per_s), flush=True)
