"""The S3 API of a node: HTTP/1.1, authentication, and one function for each operation.

Upstream: clients, through the listeners that the gateway hands a worker. Downstream: ``ingest`` and its ports, nothing else.
``http`` moves bytes and knows no S3; ``service`` turns a request into an operation: ``routes`` says which, ``auth`` for whom,
``errors`` words every refusal. Body bytes only ever go from a connection to a ``BodySink``, and from a file to a socket.
"""
