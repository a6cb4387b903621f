"""Writes to EPICS process variables over PVAccess (p4p, the extra ``epics``).

In: a PV's name and a value. Out: a put to its ``value`` field that the IOC has taken; records process as they do for any put
(``passive``). Works for NTScalar of any number type and for NTEnum (the value is the index). The addresses are those of the
environment: EPICS_PVA_ADDR_LIST, EPICS_PVA_AUTO_ADDR_LIST, EPICS_PVA_NAME_SERVERS.
"""

from __future__ import annotations

from p4p.client.thread import Context, RemoteError

from gateway.bridge.server import WriteFailed


class EpicsDriver:
    def __init__(self, conf: dict[str, str] | None = None) -> None:
        """``conf``: instead of the environment (EPICS_PVA_* names)."""
        self._context = Context("pva", conf=conf, useenv=conf is None)

    def write(self, target: str, value: float, timeout_s: float) -> None:
        try:
            # Integers go as integers: an index of an NTEnum has no other form.
            self._context.put(target, int(value) if value.is_integer() else value, timeout=timeout_s, get=False)
        except TimeoutError:
            raise WriteFailed(f"no server answers for this PV within {timeout_s:g} s") from None
        except RemoteError as error:
            raise WriteFailed(f"the IOC refused: {error}") from None
        except (ValueError, TypeError) as error:
            raise WriteFailed(f"the PV takes no number: {error}") from None

    def close(self) -> None:
        self._context.close()
