"""Private text: reading it, turning it into tokens and labels, and making batches.

Runs on the device only. Not a place for anything that crosses the wire. May import `errors` and `units`.
"""
