"""Feedback: what kernels emit, from the workers to whoever listens, within a millisecond or so.

Upstream: the workers' connections (kernels/feedback.py). Downstream: subscribers by server-sent events (sse.py), WebSocket
(websocket.py) and ZeroMQ (zeromq.py), and named actions that write to EPICS or Tango targets (actions.py decides, director.py
carries out, link.py speaks to the bridge processes).

What always holds: hub.py takes an event once, renders it once (ring.py) and waits for nobody; named actions are decided before
any subscriber is woken; who is slow loses events and is told how many; nothing here can hold up a worker.
"""
