"""The numbers that both ends of the wire agree on.

May import nothing.
"""

from __future__ import annotations

PROTOCOL_VERSION = 8
SERVICE_NAME = "tidelock.v1.Backbone"
PASS_METHOD = f"/{SERVICE_NAME}/Pass"

# Most data bytes in one TensorPart or FetchPart, and so the most that a peer can make the other hold unasked.
PART_BYTES = 1 << 20
# gRPC's own limit a message: one part and its small header.
MESSAGE_BYTES = PART_BYTES + (1 << 16)

# A stream that lives longer than this without ending is cut by both sides.
PASS_SECONDS = 600.0
# An answer to Describe, and every wait for a first byte of a fetched file.
CALL_SECONDS = 20.0
FETCH_SECONDS = 600.0

# HTTP/2 pings, which notice a peer that is gone without having said so.
KEEPALIVE_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 20_000

# Goes with a Pass whose device holds another one: the cloud refuses it rather than let it wait for a place.
NO_WAITING = ("tidelock-no-waiting", "1")
