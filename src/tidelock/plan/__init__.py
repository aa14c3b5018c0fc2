"""Which devices of a pool hold which blocks: pure functions on a profile."""
