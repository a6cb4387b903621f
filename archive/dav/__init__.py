"""WebDAV (RFC 4918, class 1, reading): the catalogue as a tree of folders, never the archive's own folders.

Upstream: s3api.http connections (``DavService`` is a handler of theirs). Downstream: the ``Catalog`` port for names
and states, the buffer's readers for bytes. GET, HEAD and OPTIONS run on the worker's loop like S3; other methods run
in WsgiDAV in a few threads.

What always holds: an acknowledged object is listed at once; listing never recalls anything; a user sees only what a
grant lets them read, everything else does not exist; every name shown leads back to exactly one key.
"""
