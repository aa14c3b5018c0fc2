"""The trainable halves, and their file format."""
