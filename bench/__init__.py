"""Measures a running gateway from outside, beside the ceiling of the machine in the same run.

Upstream: nobody; ``python -m bench`` (``make bench``). Downstream: the network, a node started as ``hiss serve``.
Invariants: it imports no room of the gateway; every figure is a ratio of medians over rounds in which ceiling and gateway
take turns, because machines are shared and noisy; the sender is the same process for both.
"""
