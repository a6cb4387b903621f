"""The archive tier: drains buffered versions to where they stay, proves the copies, frees the buffer, recalls bytes.

Upstream is the catalogue (``ingest.ports.Catalog``) and an opened version (``ingest.ports.ObjectReader``);
downstream are the targets (archive/targets) and, for recalled bytes, a landing in the buffer. The drain process
(archive/process.py) joins them. Always true here: a name in the archive only ever shows whole, verified bytes; nothing
is evicted that was not read back from the archive and recorded in the catalogue; no failure is silent.
"""
