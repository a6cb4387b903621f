"""One thin main a process role: take a ``Boot``, wire the rooms, say ready, serve until SIGTERM.

Upstream: the supervisor's nursery forks a process that calls ``main.run``. Downstream: the rooms' serve functions.
Every module here has ``main(boot: Boot) -> None``, which returns when the process has stopped cleanly.
"""
