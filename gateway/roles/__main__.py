"""``python -m gateway.roles ROLE --boot-fd N``: the main of every process that the supervisor starts."""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import sys

from gateway import boot
from gateway import logging as gateway_logging
from ingest.counters import ROLES

_GC_YOUNG_OBJECTS = 50_000
"""Young objects between two collections: requests make few cycles, and each pass costs every process milliseconds."""


def run() -> None:
    parser = argparse.ArgumentParser(prog="python -m gateway.roles", description="Started by the supervisor only.")
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("--boot-fd", type=int, required=True)
    arguments = parser.parse_args()
    told = boot.load(arguments.boot_fd)
    settings = told.load_settings()
    gateway_logging.setup(settings.log_level, settings.log_format, role=told.role, slot=told.slot)
    try:
        role = importlib.import_module(f"gateway.roles.{arguments.role}")
        # What was imported stays: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_GC_YOUNG_OBJECTS, 20, 20)
        role.main(told)
    except Exception:
        logging.getLogger(__name__).exception("%s process ends with an error", told.role)
        logging.shutdown()
        # Threads of libraries must not keep a failed process alive: the supervisor is to start a fresh one.
        os._exit(1)
    sys.exit(0)


if __name__ == "__main__":
    run()
