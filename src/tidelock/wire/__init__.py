"""What crosses between device and cloud, and what counts it."""
