"""What the server that forks `tidelock` processes has loaded, so that each of them starts at once."""

from __future__ import annotations

import os
from importlib import import_module

# As `tidelock.cli.main` sets them, which is too late in a process that has the libraries already.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# For models as small as those of the tests more threads are slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

for name in ("cli.cloud", "cli.generate", "cli.train", "cloud.server", "run.generate", "run.train"):
    import_module(f"tidelock.{name}")
