"""The shape of a cut model: its sites, their projections and every width that crosses a cut.

Both sides compute it, the device from the configuration alone, the cloud from the loaded model, and compare.
May import errors, `model.families` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, cast, final

from torch import nn
from transformers.pytorch_utils import Conv1D

from tidelock.errors import ModelError
from tidelock.model.families import Family, family_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from tidelock.model.frames import FrameChoice


class Place(IntEnum):
    """Where in a block a site is, in the order in which a block reaches them.

    A module at `ATTN` reads what the query, key and value projections read, and adds to what they give. One at
    `ATTN_OUT` or `MLP` reads what the last linear of the attention or of the MLP gives, and adds to that.
    """

    ATTN = 0
    ATTN_OUT = 1
    MLP = 2

    @property
    def label(self) -> str:
        """The name that options, files and reports use."""
        return self.name.lower().replace("_", "-")


class SiteId(NamedTuple):
    """Which site of a model; sorted as a pass reaches them."""

    block: int
    place: Place

    @property
    def name(self) -> str:
        """The name that options, logs and reports use."""
        return f"blocks.{self.block}.{self.place.label}"

    @property
    def number(self) -> int:
        """The number that stands for it on the wire."""
        return len(Place) * self.block + self.place

    @classmethod
    def from_number(cls, number: int) -> SiteId:
        """Return the site that a number of at least 0 stands for."""
        block, place = divmod(number, len(Place))
        return cls(block, Place(place))


@final
@dataclass(frozen=True, slots=True)
class Projection:
    """One linear of a site: its name in the attention module and how many numbers it gives per token."""

    name: str
    width: int


@final
@dataclass(frozen=True, slots=True)
class Site:
    """A place in a block where a PEFT module attaches.

    Attributes:
        width: Numbers per token of what the module reads.
        projections: The linears that it adds to: q, k and v, or the fused one; at an output, the one linear.
    """

    width: int
    projections: tuple[Projection, ...]

    def output_width(self, names: tuple[str, ...]) -> int:
        """Return how many numbers per token a module at this site gives for the named projections."""
        return sum(projection.width for projection in self.projections if projection.name in names)

    def widths(self, names: tuple[str, ...], frames: FrameChoice | None) -> tuple[int, int]:
        """Return how many numbers per token a module at this site reads, and how many it gives.

        Args:
            names: The targeted projections.
            frames: Those between which the module is, if there are any.
        """
        if frames is None:
            return self.width, self.output_width(names)
        return frames.rank * len(names), frames.rank * len(names)


@final
@dataclass(frozen=True, slots=True)
class Geometry:
    """All widths of a cut model.

    Attributes:
        family: The row of facts that the cut is made by.
        embedding_width: Numbers per token of the word embedding (OPT-350m: 512, though its blocks have 1024).
        final_width: Numbers per token of the state that the head reads.
        vocab_size: Rows of the head.
        max_positions: Longest sequence that the model was made for, or None when it states none.
        num_blocks: How many blocks there are.
        sites: All sites in their order: each block's attention, and where the family is known for it, its outputs.
        other_linears: Full names of the decoder's linear layers that are no query, key or value projection.
    """

    family: Family
    embedding_width: int
    final_width: int
    vocab_size: int
    max_positions: int | None
    num_blocks: int
    sites: Mapping[SiteId, Site]
    other_linears: tuple[str, ...]

    @property
    def block_width(self) -> int:
        """Numbers per token that a block gives, which is what its attention reads after a norm."""
        return self.sites[SiteId(0, Place.ATTN)].width

    def block_path(self, block: int) -> str:
        """Return the full name of a block in the causal model, e.g. `model.layers.7`."""
        return f"{self.family.decoder}.{self.family.blocks}.{block}"

    def projection_path(self, block: int, projection: str) -> str:
        """Return the full name of a projection in the causal model, e.g. `model.layers.7.self_attn.q_proj`."""
        return f"{self.block_path(block)}.{self.family.attention}.{projection}"

    def output_path(self, site: SiteId) -> str:
        """Return the full name of the linear whose output a module reads, e.g. `model.layers.7.mlp.down_proj`."""
        return f"{self.block_path(site.block)}.{self.family.outputs[site.place.label]}"


def geometry_of(model: PreTrainedModel) -> Geometry:
    """Return the geometry of a causal model, whose parameters may be on the meta device.

    Raises:
        ModelError: The model has no head or its parts are not where its family keeps them.
    """
    family = family_of(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not (isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)):
        msg = (
            f"Cutting {type(model).__name__}: expected a word embedding and a linear language-model head, got "
            f"{type(embedding).__name__} and {type(head).__name__}. Use a causal language model."
        )
        raise ModelError(msg)
    decoder = model.get_submodule(family.decoder)
    blocks = cast("nn.ModuleList", decoder.get_submodule(family.blocks))
    sites = {site_id: site for index, block in enumerate(blocks) for site_id, site in _sites(index, block, family)}
    projections = {
        f"{family.blocks}.{site_id.block}.{family.attention}.{projection.name}"
        for site_id, site in sites.items()
        if site_id.place is Place.ATTN
        for projection in site.projections
    }
    return Geometry(
        family=family,
        embedding_width=embedding.embedding_dim,
        final_width=head.in_features,
        vocab_size=head.out_features,
        max_positions=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        num_blocks=len(blocks),
        sites=sites,
        other_linears=tuple(
            f"{family.decoder}.{name}"
            for name, module in decoder.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and name not in projections
        ),
    )


def _sites(index: int, block: nn.Module, family: Family) -> Iterator[tuple[SiteId, Site]]:
    """Yield a block's sites in the order in which it reaches them."""
    yield SiteId(index, Place.ATTN), _attention_site(index, block, family)
    for place in (Place.ATTN_OUT, Place.MLP):
        path = family.outputs.get(place.label)
        if path is not None:
            name = path.rpartition(".")[2]
            _, width = _linear_widths(block.get_submodule(path), name)
            yield SiteId(index, place), Site(width, (Projection(name, width),))


def _attention_site(index: int, block: nn.Module, family: Family) -> Site:
    try:
        attention = block.get_submodule(family.attention)
        widths = [_linear_widths(attention.get_submodule(name), name) for name in family.projections]
    except AttributeError as error:
        msg = (
            f"Cutting block {index}: expected {family.projections} in its {family.attention!r}, as in block 0, got "
            f"none ({type(block).__name__}). Models that mix attention with other kinds of blocks cannot be cut."
        )
        raise ModelError(msg) from error
    inputs = {width for width, _ in widths}
    if len(inputs) != 1:
        msg = (
            f"Cutting block {index}: expected all of {family.projections} to read inputs of one width, got "
            f"{sorted(inputs)}. This attention cannot be a site."
        )
        raise ModelError(msg)
    projections = tuple(Projection(name, output) for name, (_, output) in zip(family.projections, widths, strict=True))
    return Site(inputs.pop(), projections)


def _linear_widths(module: nn.Module, name: str) -> tuple[int, int]:
    """Return (input width, output width) of a linear; GPT-2's Conv1D keeps its weight transposed."""
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return int(rows), int(columns)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    msg = f"Projection {name!r}: expected a linear layer, got {type(module).__name__}. This family cannot be cut."
    raise ModelError(msg)
