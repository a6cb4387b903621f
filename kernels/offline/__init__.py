"""Kernels over bodies in files, away from a node: what ``hiss kernel check`` and ``hiss kernel reproduce`` run.

Upstream: the user's own files, or objects fetched back from a node. Downstream: kernels.sandbox, the same process with the
same walls as on a node, from a fork server of its own. What always holds: frames are found and decoded as the node finds
and decodes them; nothing is left behind, neither processes nor memory.
"""
