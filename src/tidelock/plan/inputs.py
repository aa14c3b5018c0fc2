"""What a plan is made from: a profile of a pool, checked when it is read.

A profile says what PAC's calibration run measures (arXiv 2408.10746, section 4): for each device the seconds of each
block by rows of a micro-batch, and its memory; for each block its bytes; for each pair of devices its link. It knows no
methods: `side` and `lora` differ in these numbers only.

May import errors and pydantic.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tidelock.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = "tidelock-pool-profile"

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Speed = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    """A part of a profile: no other fields, no conversions, no changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Block(_Part):
    """One block, in the order of the model; embedding and head count into the first and the last, or as blocks.

    Attributes:
        name: What people call it.
        parameter_bytes: All its weights, frozen and trained.
        gradient_bytes: Gradients of its trained weights; what an AllReduce moves.
        optimizer_bytes: What the optimizer keeps for them: for Adam, two moments.
        kept_bytes_per_row: Kept for each row from its forward to its backward.
        working_bytes_per_row: Needed for each row while it is computed, and free afterwards.
        forward_bytes_per_row: Sent to who has the next block, for each row.
        backward_bytes_per_row: Sent back from there, for each row.
    """

    name: Name
    parameter_bytes: Count
    gradient_bytes: Count
    optimizer_bytes: Count
    kept_bytes_per_row: Count
    working_bytes_per_row: Count
    forward_bytes_per_row: Count
    backward_bytes_per_row: Count


class Device(_Part):
    """One device.

    Attributes:
        name: What people call it; no two are alike.
        memory_bytes: What it can give to this work.
        rows: Sizes of a micro-batch that were measured, ascending.
        forward_seconds: For each of these sizes, the seconds of each block's forward.
        backward_seconds: Likewise of its backward.
        spread: How far the measured seconds of one thing were apart, as a share of their median; 0 when not known.
    """

    name: Name
    memory_bytes: Count
    rows: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, strict=False)]
    forward_seconds: Annotated[tuple[Annotated[tuple[Seconds, ...], Field(strict=False)], ...], Field(strict=False)]
    backward_seconds: Annotated[tuple[Annotated[tuple[Seconds, ...], Field(strict=False)], ...], Field(strict=False)]
    spread: Seconds = 0.0


class Link(_Part):
    """How two devices reach each other; both ways at once, each at this speed.

    Attributes:
        bytes_per_second: Of one way.
        latency_seconds: From one end to the other.
    """

    bytes_per_second: Speed
    latency_seconds: Seconds


class LinkBetween(Link):
    """The link of one pair of devices, by their names."""

    devices: Annotated[tuple[Name, Name], Field(strict=False)]


class Links(_Part):
    """The default link, and those of pairs that have another."""

    default: Link
    between: Annotated[tuple[LinkBetween, ...], Field(strict=False)] = ()


class Profile(_Part):
    """A pool and a model on it.

    Attributes:
        format: Says what the file is.
        version: Of the format.
        title: What was profiled, for people.
        blocks: In the order of the model.
        devices: In any order.
        links: Between devices.
    """

    format: Literal["tidelock-pool-profile"]
    version: Literal[1]
    title: str
    blocks: Annotated[tuple[Block, ...], Field(min_length=1, strict=False)]
    devices: Annotated[tuple[Device, ...], Field(min_length=1, strict=False)]
    links: Links

    @model_validator(mode="after")
    def _check(self) -> Profile:
        for device in self.devices:
            _check_table(device, len(self.blocks))
        names = [device.name for device in self.devices]
        _expect_once("a name for each device", names)
        for link in self.links.between:
            unknown = [name for name in link.devices if name not in names]
            _expect(not unknown, f"links between devices of the profile, got {', '.join(unknown)}")
            _expect(link.devices[0] != link.devices[1], f"links between two devices, got {link.devices[0]!r} twice")
        pairs = [" and ".join(sorted(link.devices)) for link in self.links.between]
        _expect_once("one link for each pair", pairs)
        return self

    def link(self, one: int, other: int) -> Link:
        """Return the link between two devices, by their numbers."""
        names = {self.devices[one].name, self.devices[other].name}
        return next((link for link in self.links.between if set(link.devices) == names), self.links.default)


def read_profile(path: Path) -> Profile:
    """Return the profile in a JSON file.

    Raises:
        DataError: The file cannot be read, is no JSON, or breaks a rule of the format.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are no UTF-8"
        msg = f"Profile: expected a JSON file, got {reason} ({path}). Check the path."
        raise DataError(msg) from error
    return parse_profile(text, str(path))


def parse_profile(text: str, where: str) -> Profile:
    """Return the profile that a JSON text holds.

    Args:
        text: The JSON.
        where: Named in errors.

    Raises:
        DataError: The text is no JSON, or breaks a rule of the format.
    """
    try:
        return Profile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the profile"
        got = "" if isinstance(first["input"], dict | list) or first["type"] == "json_invalid" else first["input"]
        message = first["msg"].removeprefix("Value error, ")
        value = f", got {got!r}" if got != "" and first["type"] != "value_error" else ""
        msg = f"Profile: expected the form of docs/pool.md; {field}: {message}{value} ({where}). Mend it there."
        raise DataError(msg) from error


def _check_table(device: Device, blocks: int) -> None:
    rising = all(low < high for low, high in zip(device.rows, device.rows[1:], strict=False))
    _expect(rising, f"rows that rise, got {list(device.rows)} ({device.name})")
    for name, table in (("forward", device.forward_seconds), ("backward", device.backward_seconds)):
        found = f"({device.name}, {name}_seconds)"
        _expect(
            len(table) == len(device.rows), f"{len(device.rows)} lists, one for each of rows, got {len(table)} {found}"
        )
        wrong = next((len(line) for line in table if len(line) != blocks), blocks)
        _expect(wrong == blocks, f"seconds of {blocks} blocks in each list, got {wrong} {found}")
    _expect(any(chain(*device.forward_seconds, *device.backward_seconds)), f"a time above 0 ({device.name})")


def _expect(holds: bool, rule: str) -> None:  # noqa: FBT001  (what is checked)
    if not holds:
        msg = f"expected {rule}"
        raise ValueError(msg)


def _expect_once(rule: str, names: list[str]) -> None:
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    _expect(count <= 1, f"{rule}, got {name!r} {count} times")
