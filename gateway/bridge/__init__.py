"""Bridges to control systems: one supervised process a protocol that writes values to EPICS or Tango targets.

Upstream: the control process, over ``run/SCHEME.sock`` (wire.py). Downstream: IOCs and device servers of the beamline. What
always holds: nothing is decided here (which target, which value, how often: gateway/control/feedback/actions.py), and a
control system that hangs, or a client library that crashes, costs this process and never the control process or ingest.
"""
