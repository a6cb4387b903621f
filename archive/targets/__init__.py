"""Archive targets: where drained versions stay. ``base`` is the contract and its errors, one target a file beside it.

Upstream is the drain process. Every target passes the same contract suite (tests/archive/test_target_contract.py).
"""
