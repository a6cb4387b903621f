"""The composition root: it joins the rooms into a node and is the operator's side of it (CLI, control API, metrics).

Upstream: nobody imports this room. Downstream: ``ingest``, ``kernels``, ``s3api``, ``archive``, wired in gateway/roles.
What always holds: one supervisor holds a data folder (a lock says so), owns the listeners and the arena's memory, and
every other process of the node is its child and dies with it.
"""
