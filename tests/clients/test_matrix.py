"""Every client does every step of the scenario that it can do at all, over HTTP and over TLS."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.clients.adapters import ADAPTERS, Adapter
from tests.clients.node import ClientNode
from tests.clients.scenario import STEPS, Stage


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("adapter", ADAPTERS, indirect=True, ids=lambda kind: kind.name.replace(" ", "-"))
@pytest.mark.parametrize("node", ["http", "https"], indirect=True)
def test_client(node: ClientNode, adapter: Adapter, stage: Stage, step: Callable[[Adapter, Stage], None]) -> None:
    """What an adapter cannot do is taken out when tests are collected (conftest.py)."""
    step(adapter, stage)


def test_what_a_client_cannot_do_is_a_step_with_a_reason() -> None:
    names = {step.__name__ for step in STEPS}
    for kind in ADAPTERS:
        assert kind.cannot.keys() <= names
        assert all(kind.cannot.values())
