"""Exit with 0 if the server of this container answers on /healthz, else with 1; for HEALTHCHECK.

It finds the server by the variables that the server itself reads, so change its address, port or
TLS by these (EAGLE3_PORT, not --port). Standard library only: it runs every few seconds.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys

host = os.environ.get("EAGLE3_HOST") or "127.0.0.1"
host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
port = int(os.environ.get("EAGLE3_PORT") or 8001)
connection = http.client.HTTPConnection(host, port, timeout=4)
if os.environ.get("EAGLE3_TLS_CERTIFICATE"):
    # Whether it answers is asked, not who it is: the certificate is of the name trainers use.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection(host, port, timeout=4, context=context)
try:
    connection.request("GET", "/healthz")
    status = connection.getresponse().status
except OSError as exc:
    sys.exit(f"no answer from {host} port {port}: {exc}")
sys.exit(None if status == http.client.OK else f"/healthz answered {status}")
