"""Writes to EPICS process variables over PVAccess (p4p, the extra ``epics``).

In: a PV's name and a value. Out: a put to its ``value`` field that the IOC has taken; records process as they do for any put
(``passive``). Works for NTScalar of any number type and for NTEnum (the value is the index); nothing is rounded. The
addresses are those of the environment: EPICS_PVA_ADDR_LIST, EPICS_PVA_AUTO_ADDR_LIST, EPICS_PVA_NAME_SERVERS.
"""

from __future__ import annotations

from p4p import Type, Value
from p4p.client.thread import Context, RemoteError

from gateway.bridge.server import WriteFailed


class EpicsDriver:
    def __init__(self, conf: dict[str, str] | None = None) -> None:
        """``conf``: instead of the environment (EPICS_PVA_* names)."""
        self._context = Context("pva", conf=conf, useenv=conf is None)

    def write(self, target: str, value: float, timeout_s: float) -> None:
        try:
            self._context.put(target, lambda put: _fill(put, value), timeout=timeout_s, get=False)
        except TimeoutError:
            raise WriteFailed(f"no server answers for this PV within {timeout_s:g} s") from None
        except RemoteError as error:
            raise WriteFailed(f"the IOC refused: {error}") from None

    def close(self) -> None:
        self._context.close()


def _fill(put: Value, value: float) -> None:
    """Set the value of a put by the PV's type. Raises WriteFailed rather than let it be rounded."""
    kind = put.type()["value"] if "value" in put.keys() else None
    if isinstance(kind, Type) and "index" in kind.keys():
        kind, field = "i", "value.index"
    else:
        field = "value"
    if kind in ("d", "f"):
        put[field] = value
    elif not (isinstance(kind, str) and kind in "?bBhHiIlL"):
        raise WriteFailed("the PV takes no number")
    elif not value.is_integer():
        raise WriteFailed(f"the PV takes whole numbers, not {value!r}")
    else:
        put[field] = int(value)
