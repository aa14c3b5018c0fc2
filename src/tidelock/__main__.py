"""Makes `python -m tidelock` the same as the `tidelock` command."""

from __future__ import annotations

from tidelock.cli.main import main

main()
