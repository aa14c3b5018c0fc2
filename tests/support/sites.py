"""Sites by a short name."""

from __future__ import annotations

from tidelock.model.geometry import Place, SiteId


def attn(block: int) -> SiteId:
    """Return the site at a block's attention."""
    return SiteId(block, Place.ATTN)
