"""Follow a bucket's feedback by server-sent events: python feedback_sse.py http://localhost:9001 BUCKET ACCESS_KEY SECRET_KEY

Prints one JSON object an event. Comes back where it was when the connection ends. Needs nothing but Python.
"""

import base64
import http.client
import sys
import time
from urllib.parse import urlsplit

control, bucket, access_key, secret_key = sys.argv[1:]
url = urlsplit(control)
token = base64.b64encode(f"{access_key}:{secret_key}".encode()).decode()
headers = {"Authorization": f"Basic {token}"}
while True:
    connection = (http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection)(url.netloc)
    try:
        connection.request("GET", f"/v1/feedback?bucket={bucket}", headers=headers)
        answer = connection.getresponse()
        if answer.status != 200:
            sys.exit(f"{answer.status} {answer.read().decode()}")
        for line in answer:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "id":
                headers["Last-Event-ID"] = (
                    value  # sent when we come back: what was missed follows, or a gap says how much
                )
            elif field == "data":
                print(value, flush=True)
    except OSError:
        time.sleep(1)
