"""Where the frozen blocks run: in this process, or in a cloud."""
