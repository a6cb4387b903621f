"""Follow a bucket's feedback by WebSocket: python feedback_websocket.py http://localhost:9001 BUCKET ACCESS_KEY SECRET_KEY

Prints one JSON object an event. Needs the package websockets. A browser cannot set the Authorization field; it offers the key
pair as a subprotocol instead: new WebSocket(url, ["hiss.feedback", "hiss.basic." + base64url(access + ":" + secret)]).
"""

import base64
import json
import sys
import time

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

control, bucket, access_key, secret_key = sys.argv[1:]
token = base64.b64encode(f"{access_key}:{secret_key}".encode()).decode()
last_id = ""
while True:
    url = f"{control.replace('http', 'ws', 1)}/v1/feedback?bucket={bucket}&last_event_id={last_id}"
    try:
        with connect(url, additional_headers={"Authorization": f"Basic {token}"}) as socket:
            for message in socket:
                for event in json.loads(message):
                    last_id = event["id"]
                    print(json.dumps(event), flush=True)
    except (ConnectionClosed, OSError):
        time.sleep(1)
