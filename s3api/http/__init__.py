"""HTTP/1.1 for the gateway: accept, read heads, receive bodies into place, send answers.

Upstream: listening sockets the supervisor bound. Downstream: a ``message.Handler`` (S3 operations, WebDAV).
``listener`` accepts, ``connection`` drives one peer, ``head`` and ``chunked`` are pure parsers, ``body`` moves payload
into a ``BodySink``, ``send`` writes responses and stored files, ``limits`` bounds all of it.

Invariants: a body byte is copied by the kernel to its final place, or at most once more out of the connection's inbox;
bytes behind a request are neither parsed nor answered before that request's answer is written; every wait has a limit.
"""
