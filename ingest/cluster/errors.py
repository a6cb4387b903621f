"""What goes wrong between a node and its cluster's engine; no client meets these."""

from __future__ import annotations

from ingest.errors import IngestError


class EngineAway(IngestError):
    """The engine does not answer, or refuses to; whether a commit under way was made is not known."""


class ClusterRefused(IngestError):
    """This node cannot be part of this cluster; ``str()`` says why and what to do."""
