"""What every process of a node does first: the nursery forks, the fork calls ``run``."""

from __future__ import annotations

import gc
import importlib
import logging
import os

from gateway import boot
from gateway import logging as gateway_logging

_GC_YOUNG_OBJECTS = 50_000
"""Young objects between two collections: requests make few cycles, and each pass costs every process milliseconds."""


def run(role: str, boot_fd: int) -> int:
    """Be the role until it has stopped cleanly; the exit code. Does not return when it fails."""
    told = boot.load(boot_fd)
    settings = told.load_settings()
    gateway_logging.setup(settings.log_level, settings.log_format, role=told.role, slot=told.slot)
    try:
        module = importlib.import_module(f"gateway.roles.{role}")
        # What was imported stays: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_GC_YOUNG_OBJECTS, 20, 20)
        module.main(told)
    except Exception:
        logging.getLogger(__name__).exception("%s process ends with an error", told.role)
        logging.shutdown()
        # Threads of libraries must not keep a failed process alive: the supervisor is to start a fresh one.
        os._exit(1)
    return 0
