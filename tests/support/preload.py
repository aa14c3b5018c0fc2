"""What the server that forks `tidelock` processes has loaded, so that each of them starts at once."""

from __future__ import annotations

import os

# As `tidelock.cli.main` sets them, which is too late in a process that has the libraries already.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# For models as small as those of the tests more threads are slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tidelock.cli.cloud
import tidelock.cli.generate
import tidelock.cli.train
import tidelock.cloud.server
import tidelock.run.generate
import tidelock.run.train
