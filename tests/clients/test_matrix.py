"""Every client does every step of the scenario that it can do at all, over HTTP and over TLS."""

from __future__ import annotations

import pytest

from tests.clients.adapters import ADAPTERS, Adapter
from tests.clients.scenario import STEPS, Stage

MATRIX = [
    pytest.param(scheme, kind, step, id=f"{scheme}-{kind.name.replace(' ', '-')}-{step.__name__}")
    for scheme in ("http", "https")
    for kind in ADAPTERS
    for step in STEPS
    if step.__name__ not in kind.cannot
]


@pytest.mark.parametrize(("node", "adapter", "step"), MATRIX, indirect=["node", "adapter"])
def test_client(adapter: Adapter, stage: Stage, step) -> None:
    step(adapter, stage)


def test_what_a_client_cannot_do_is_a_step_with_a_reason() -> None:
    names = {step.__name__ for step in STEPS}
    for kind in ADAPTERS:
        assert kind.cannot.keys() <= names
        assert all(kind.cannot.values())
