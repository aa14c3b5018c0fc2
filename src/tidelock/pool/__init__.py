"""A pool of one's own devices, which train one model together: stages of blocks, each on a group of peers."""
