"""``/v1/health``: 200 once the node serves, 503 with the reasons otherwise.

In: the node's own check, injected by the composition root. Out: status and JSON. A check that fails or takes too long
is a no. A node that serves reads and takes no bodies (the engine of its cluster is away, it is being drained) is degraded: 200 to
whoever asks in general, since a load balancer that took every node out would take the reads with them; 503 to whoever asks
``?for=write``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 2.0

HealthCheck = Callable[[], Awaitable[tuple[bool, dict[str, Any]]]]
"""``(can the node take a PUT, details)``; details must hold no secret, bucket, key or user: anyone may read them.
``degraded`` among them, where it is not empty, says why a node that serves takes no bodies."""


async def health(check: HealthCheck, *, for_write: bool = False) -> tuple[int, dict[str, Any]]:
    """(HTTP status, document). ``for_write``: whether bodies are taken is what counts."""
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            healthy, details = await check()
    except TimeoutError:
        healthy, details = False, {"reason": f"the check took longer than {CHECK_TIMEOUT_S:g} s"}
    except Exception:
        logger.exception("the health check failed")
        healthy, details = False, {"reason": "the check failed; the node's log says why"}
    status = "degraded" if healthy and details.get("degraded") else "ok" if healthy else "unavailable"
    return (200 if status == "ok" or (healthy and not for_write) else 503), {"status": status, **details}
