"""The catalogue: what is stored, where, and the one way to change it.

Upstream: every process of the node, through ``client.CatalogClient`` (mutations over a unix socket to the catalogue
process, reads straight from SQLite). Downstream: the journal (ingest/journal.py) and the file DIR/catalogue.

What always holds:
- a mutation is decided once (decide.py), becomes one entry (entries.py), is durable in the journal, then visible in the
  index, then answered, in this order;
- the index is a pure function of the entries: replaying the journal gives the identical database;
- one process writes; a reader sees every write that was answered.
"""
