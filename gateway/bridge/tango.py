"""Writes to attributes of Tango devices (pytango, the extra ``tango``).

In: ``DOMAIN/FAMILY/MEMBER/ATTRIBUTE``, or in full ``//HOST:PORT/DOMAIN/FAMILY/MEMBER/ATTRIBUTE#dbase=no``, and a value. Out:
``write_attribute`` that the device has answered. Whole numbers go as integers to integer, enumerated and boolean attributes. The
database is that of TANGO_HOST. What always holds: a device that was away is looked up anew at the next write.
"""

from __future__ import annotations

import threading

import tango

from gateway.bridge.server import WriteFailed

_INTEGERS = (
    tango.CmdArgType.DevShort, tango.CmdArgType.DevLong, tango.CmdArgType.DevLong64, tango.CmdArgType.DevUShort,
    tango.CmdArgType.DevULong, tango.CmdArgType.DevULong64, tango.CmdArgType.DevUChar, tango.CmdArgType.DevEnum,
)  # fmt: skip


class TangoDriver:
    def __init__(self) -> None:
        self._devices: dict[str, tuple[tango.DeviceProxy, int]] = {}
        self._guard = threading.Lock()

    def write(self, target: str, value: float, timeout_s: float) -> None:
        device, attribute = names(target)
        with tango.EnsureOmniThread():
            try:
                proxy, data_type = self._known(target, device, attribute, timeout_s)
                proxy.write_attribute(attribute, _converted(value, data_type))
            except tango.DevFailed as failure:
                with self._guard:
                    self._devices.pop(target, None)
                raise WriteFailed(_reason(failure)) from None

    def _known(self, target: str, device: str, attribute: str, timeout_s: float) -> tuple[tango.DeviceProxy, int]:
        with self._guard:
            found = self._devices.get(target)
        if found is None:
            proxy = tango.DeviceProxy(device)
            found = proxy, proxy.get_attribute_config(attribute).data_type
            with self._guard:
                self._devices[target] = found
        found[0].set_timeout_millis(max(1, round(timeout_s * 1000)))
        return found


def names(target: str) -> tuple[str, str]:
    """(device, attribute) of a target; what follows ``#`` belongs to the device."""
    path, mark, database = target.partition("#")
    device, _, attribute = path.rpartition("/")
    return f"{'tango:' if device.startswith('//') else ''}{device}{mark}{database}", attribute


def _converted(value: float, data_type: int) -> float | int | bool:
    if data_type == tango.CmdArgType.DevBoolean:
        return bool(value)
    if data_type in _INTEGERS:
        if not value.is_integer():
            raise WriteFailed(f"the attribute takes whole numbers, not {value!r}")
        return int(value)
    return value


def _reason(failure: tango.DevFailed) -> str:
    first = failure.args[0]
    return f"{first.reason}: {' '.join(str(first.desc).split())}"
