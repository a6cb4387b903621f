"""The control port: health, status, runs, feedback and metrics over HTTP (FastAPI on uvicorn).

Upstream: operators, instruments, Prometheus, the ``hiss`` commands. Downstream: shared-memory counters, the
catalogue's read side, DATA/run/processes.json, and the feedback socket that the workers write to.

What always holds: nothing here is in the way of ingest, and nothing here changes a byte; health and metrics answer
without credentials and say nothing about buckets, keys or users; everything else asks for an S3 key pair.
"""
