"""``/v1/health``: 200 once the node can take a PUT, 503 with the reasons otherwise.

In: the node's own check, injected by the composition root. Out: status and JSON. A check that fails or takes too long
is a no.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 2.0

HealthCheck = Callable[[], Awaitable[tuple[bool, dict[str, Any]]]]
"""``(can the node take a PUT, details)``; details must hold no secret, bucket, key or user: anyone may read them."""


async def health(check: HealthCheck) -> tuple[int, dict[str, Any]]:
    """(HTTP status, document)."""
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            healthy, details = await check()
    except TimeoutError:
        healthy, details = False, {"reason": f"the check took longer than {CHECK_TIMEOUT_S:g} s"}
    except Exception:
        logger.exception("the health check failed")
        healthy, details = False, {"reason": "the check failed; the node's log says why"}
    return (200 if healthy else 503), {"status": "ok" if healthy else "unavailable", **details}
