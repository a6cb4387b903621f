"""Delivers bucket notifications: takes events from the catalogue and posts them to the webhooks that the operator named.

In: ``notification_endpoints`` (name -> URL) and the events that wait. Out: one POST of JSON for each event, at least once, in
the order of their commits. An event is done once the endpoint answered 2xx; else it is tried again, later and later; it is given
up when it is MAX_AGE_S old, or the endpoint has refused it (4xx) REFUSALS_MAX times.
Always true: endpoints wait for none but themselves, and nobody waits for an endpoint; what was not done when the process ended
is delivered by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections.abc import Callable, Mapping, Sequence

import httpx

from archive.pace import retry_after_s
from ingest.counters import Counters
from ingest.errors import IngestError
from ingest.ports import Catalog

log = logging.getLogger(__name__)

POLL_S = 0.5
PAGE = 64
TIMEOUT_S = 10.0
RETRY_FIRST_S, RETRY_CAP_S = 1.0, 300.0
CATALOGUE_RETRY_CAP_S = 30.0
MAX_AGE_S = 86_400.0
"""Counted from the first failure of the event at the queue's head, in one life of the process."""
REFUSALS_MAX = 5
_TRY_LATER = frozenset({408, 425, 429})
"""4xx that ask for patience; the others say that the event itself is not wanted."""


@dataclasses.dataclass(slots=True)
class _Head:
    """The first event of an endpoint's queue, once it could not be delivered."""

    sequence: int = 0
    attempts: int = 0
    refusals: int = 0
    failing_since_s: float = 0.0


class Deliverer:
    """``targets``: endpoint -> URL."""

    def __init__(
        self,
        catalog: Catalog,
        counters: Counters,
        targets: Mapping[str, str],
        *,
        retry_first_s: float = RETRY_FIRST_S,
        leads: Callable[[], bool] = lambda: True,
    ) -> None:
        """``leads``: whether events are for this node of a cluster to deliver."""
        self._leads = leads
        self._catalog = catalog
        self._targets = targets
        self._retry_first_s = retry_first_s
        self._failing: set[str] = set()
        self._delivered = counters.cell("hiss_notifications_delivered_total")
        self._failures = counters.cell("hiss_notifications_failures_total")
        self._dropped = counters.cell("hiss_notifications_dropped_total")
        self._waiting = counters.cell("hiss_notifications_waiting")
        self._broken = counters.cell("hiss_notifications_failing_endpoints")

    async def run(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group, httpx.AsyncClient(timeout=TIMEOUT_S, follow_redirects=False) as http:
            group.create_task(self._watch(stop))
            posting = [asyncio.create_task(self._serve(name, url, http, stop)) for name, url in self._targets.items()]
            await stop.wait()
            for task in posting:
                task.cancel()
            await asyncio.gather(*posting, return_exceptions=True)

    async def _watch(self, stop: asyncio.Event) -> None:
        """Count what waits, and give up what waits for an endpoint that the settings no longer have."""
        while not stop.is_set():
            with contextlib.suppress(IngestError):
                counts = await self._catalog.notice_counts()
                self._waiting.set(sum(counts.values()))
                for name in counts.keys() - self._targets.keys() if self._leads() else ():
                    page = await self._catalog.notices(name, PAGE)
                    await self._done([sequence for sequence, _ in page])
                    self._dropped.add(len(page))
                    log.error("%d events for %s are given up: no such notification endpoint", len(page), name)
            await _pause(POLL_S, stop)

    async def _serve(self, name: str, url: str, http: httpx.AsyncClient, stop: asyncio.Event) -> None:
        rng = random.Random()
        head = _Head()
        trouble, failed = "", 0
        while not stop.is_set():
            try:
                pause_s = await self._turn(name, url, http, head, rng)
            except IngestError as error:
                if str(error) != trouble:
                    log.warning("notifications for %s wait: %s", name, error)
                # What was posted and could not be confirmed is posted again: less and less often.
                pause_s = retry_after_s(failed, POLL_S, CATALOGUE_RETRY_CAP_S, rng)
                trouble, failed = str(error), failed + 1
            else:
                trouble, failed = "", 0
            await _pause(pause_s, stop)

    async def _turn(self, name: str, url: str, http: httpx.AsyncClient, head: _Head, rng: random.Random) -> float:
        """Deliver what waits; how long to wait before the next turn. Raises CatalogError, StorageFailed."""
        if not self._leads():
            head.attempts = head.refusals = 0
            return POLL_S
        page = await self._catalog.notices(name, PAGE)
        done, refused = await self._post(name, url, http, page)
        if done == len(page):
            head.attempts = head.refusals = 0
            return 0.0 if page else POLL_S
        now_s = asyncio.get_running_loop().time()
        stuck = page[done][0]
        if stuck != head.sequence:
            head.sequence, head.refusals, head.failing_since_s = stuck, 0, now_s
            head.attempts = head.attempts if not done else 0
        head.attempts, head.refusals = head.attempts + 1, head.refusals + refused
        if head.refusals >= REFUSALS_MAX or now_s - head.failing_since_s > MAX_AGE_S:
            await self._done([stuck])
            self._dropped.add()
            log.error("an event for the endpoint %s is given up after %d attempts", name, head.attempts)
            return 0.0
        return retry_after_s(head.attempts - 1, self._retry_first_s, RETRY_CAP_S, rng)

    async def _post(
        self, name: str, url: str, http: httpx.AsyncClient, page: Sequence[tuple[int, bytes]]
    ) -> tuple[int, bool]:
        """How many of the page the endpoint took, and whether it refused the next one."""
        taken: list[int] = []
        refused = False
        for sequence, event in page:
            try:
                async with http.stream(
                    "POST", url, content=event, headers={"content-type": "application/json"}
                ) as answer:
                    status = answer.status_code  # the body of an answer is nobody's
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                self._failed(name, f"{type(error).__name__}: {error}")
                break
            if not 200 <= status < 300:
                refused = 300 <= status < 500 and status not in _TRY_LATER
                self._failed(name, f"it answered {status}")
                break
            taken.append(sequence)
        if taken:
            await self._done(taken)
            self._delivered.add(len(taken))
        if taken and len(taken) == len(page) and name in self._failing:
            log.info("the notification endpoint %s takes events again", name)
            self._failing.discard(name)
            self._broken.set(len(self._failing))
        return len(taken), refused

    def _failed(self, name: str, why: str) -> None:
        self._failures.add()
        if name not in self._failing:
            log.error("the notification endpoint %s fails, events wait: %s", name, why)
            self._failing.add(name)
            self._broken.set(len(self._failing))

    async def _done(self, sequences: Sequence[int]) -> None:
        await self._catalog.noticed(sequences)


async def _pause(seconds: float, stop: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()
