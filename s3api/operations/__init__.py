"""One function for each S3 operation: ``async (Call) -> Response``, grouped by what they work on.

Upstream: s3api.routes names them. Downstream: the catalogue and the data plane, through the ports of ``ingest`` only.
Always holds: whatever can be refused from the request's head is refused before its body is read; a failed write leaves
nothing behind.
"""
