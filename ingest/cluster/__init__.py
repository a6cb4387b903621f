"""More than one node: a PostgreSQL-compatible engine keeps the journal, the members and their leases.

Upstream: the catalogue process, whose committer writes its batches to the engine's log instead of a file, and every process
that wants to know who else there is. Downstream: the engine, over SQLAlchemy and asyncpg.

What always holds: all nodes decide one after the other, each with everything decided before in its index; a batch is in the
log as a whole or not at all; who lost its place (a second process of the same number) writes nothing any more.
"""
