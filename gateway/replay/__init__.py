"""``hiss replay``: what is stored is reduced again on a Dask cluster, with the kernels, the sandbox and the merge of a node.

Upstream: gateway/cli/replay.py. Downstream: kernels/offline (judging one task, merging) and an S3 endpoint.

- ``access``, ``ranges``: where objects are read, with which keys; ranges of them.
- ``station``: what a Dask worker process needs for its tasks (fork server, sandboxes, connections); ``dask_worker``: the
  plug-in that puts it there, and the functions that the graph consists of.
- ``plan``: the kernel, its settings, the objects, the live products that say which settings held when.
- ``drive``: tasks in flight, folded in the order of keys; ``results``: products staged, compared, stored.
- ``cluster``: finding or making a cluster, and what is refused of it.

What always holds: no secret is in the graph; an object's frames count once, whatever was tried again; products are stored only
once everything is over.
"""
