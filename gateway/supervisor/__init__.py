"""The supervisor: the one process that owns what must outlive any other process of the node, and keeps those running.

Upstream: ``hiss serve`` (gateway/cli/serve.py). Downstream: child processes (gateway/roles) through gateway/boot.py.
What always holds: the data folder's lock, the listening sockets, the arena's memory and the counters belong to the
supervisor and are handed to every process of a slot in turn; no body byte, no catalogue row and no request passes
through it. Its own death kills every child.
"""
