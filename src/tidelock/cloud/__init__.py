"""The server that holds a frozen model; it has no code that reads text."""
