"""Follow a bucket's feedback by ZeroMQ: python feedback_zmq.py tcp://127.0.0.1:9003 BUCKET

Prints one JSON object an event, and on stderr how many were lost. Needs the package pyzmq; asks for no key pair (see feedback_zmq
in docs/OPERATIONS.md).
"""

import sys

import zmq

endpoint, bucket = sys.argv[1:]
socket = zmq.Context().socket(zmq.SUB)
socket.connect(endpoint)
socket.subscribe(f"{bucket}/".encode())
socket.subscribe(b"_heartbeat")
last: dict[bytes, int] = {}
while True:
    topic, event, number_bytes = socket.recv_multipart()
    number = int.from_bytes(number_bytes, "big")
    if number > last.get(topic, number - 1) + 1:
        print(f"{topic.decode()}: {number - last[topic] - 1} messages lost", file=sys.stderr)
    last[topic] = number  # a number that does not grow: the node's control process is new
    print(event.decode(), flush=True)
