"""The frozen model: its files, its geometry, the cut, the walk through its blocks."""
