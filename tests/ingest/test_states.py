"""The table of transitions: what may happen to a version, and above all what may not."""

from __future__ import annotations

import pytest

from ingest.errors import StaleVersion
from ingest.records import ObjectState
from ingest.states import TRANSITIONS, Event, possible, transition


def test_nothing_is_evicted_that_was_not_archived() -> None:
    assert {state for state, event in TRANSITIONS if event is Event.EVICT} == {ObjectState.ARCHIVED}
    entrances = {event for (_, event), after in TRANSITIONS.items() if after is ObjectState.ARCHIVED}
    assert entrances == {Event.DRAINED, Event.RECALLED}


def test_every_committed_state_can_be_deleted_and_deleted_is_the_end() -> None:
    for state in set(ObjectState) - {ObjectState.RECEIVING, ObjectState.DELETED}:
        assert transition(state, Event.DELETE) is ObjectState.DELETED
    for event in Event:
        assert not possible(ObjectState.DELETED, event)


def test_an_impossible_event_is_a_stale_version() -> None:
    with pytest.raises(StaleVersion, match="evict cannot happen to a version that is buffered"):
        transition(ObjectState.BUFFERED, Event.EVICT)
