"""Whole runs, assembled from the parts."""
