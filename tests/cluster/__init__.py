"""Nodes of a cluster as real processes on real links: killed, frozen, cut off, filled up, set back.

Upstream: ``hiss serve`` and PostgreSQL in network namespaces. Downstream: nobody. One cluster of three nodes serves all files but
the thrasher's; every test leaves it whole. After each test every acknowledged object is readable on every node, drained once.
"""
