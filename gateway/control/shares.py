"""The thread that rebalances a node's reserved lanes: twenty times a second, whatever the control process has to answer.

In: the catalogue, the node's ``ShareTable``. Out: the table. A thread, so that a long answer on the loop delays no taking back; a
catalogue that cannot be read for a while leaves the table as it is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from ingest.catalog.client import CatalogClient
from ingest.counters import Counters
from ingest.errors import IngestError
from ingest.rebalance import TICK_S, Rebalancer
from ingest.share_table import ShareTable

log = logging.getLogger(__name__)

_SAY_AGAIN_S = 60.0


@contextlib.contextmanager
def rebalancing(catalog: CatalogClient, table: ShareTable, ceiling: int, counters: Counters) -> Iterator[None]:
    """Rebalance while the context is open."""
    rebalancer = Rebalancer(
        table,
        node=lambda: catalog.node,
        ceiling=ceiling,
        generation=catalog.generation,
        read=catalog.reserved,
        used=catalog.used_bytes,
        counters=counters,
    )
    stop = threading.Event()

    def run() -> None:
        said = -_SAY_AGAIN_S
        while not stop.wait(TICK_S):
            try:
                rebalancer.step(catalog.now_ns(), time.monotonic_ns())
            except (IngestError, OSError) as error:
                if time.monotonic() - said >= _SAY_AGAIN_S:
                    said = time.monotonic()
                    log.warning("reservations cannot be read, the shares stay as they are: %s", error)

    thread = threading.Thread(target=run, name="rebalance", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
