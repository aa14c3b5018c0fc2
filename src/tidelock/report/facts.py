"""What a run was made of, as it is kept in its folder: versions, the model's shape, sizes of the data; no content.

May import libraries.
"""

from __future__ import annotations

from typing import final

from pydantic import BaseModel, ConfigDict


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@final
class SiteFacts(_Facts):
    """One site at which a PEFT module of the run attaches.

    Attributes:
        name: Such as `blocks.7.attn`.
        block: Its block; all sites of a block belong to one PEFT module.
        input_width: Numbers per token that the module reads there.
        output_width: Numbers per token that it answers.
    """

    name: str
    block: int
    input_width: int
    output_width: int


@final
class ModelFacts(_Facts):
    """The shape of the run's model.

    Attributes:
        family: Its family.
        num_blocks: Its blocks, with and without a module.
        embedding_width: Numbers per token of the word embedding.
        final_width: Numbers per token of the state that the head reads.
        trained_parameters: All numbers that are trained.
        sites: Those with a module, in the order in which a forward pass comes to them.
        tapped: The blocks whose outputs a side network reads, ascending.
    """

    family: str
    num_blocks: int
    embedding_width: int
    final_width: int
    trained_parameters: int
    sites: tuple[SiteFacts, ...] = ()
    tapped: tuple[int, ...] = ()

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that have a PEFT module, or that a side network reads, in order."""
        return self.tapped or tuple(sorted({site.block for site in self.sites}))


@final
class DataFacts(_Facts):
    """The size of some encoded examples.

    Attributes:
        examples: How many.
        tokens: Real tokens in them.
        labelled: Tokens that are predicted, and so have a loss.
    """

    examples: int
    tokens: int
    labelled: int


@final
class RunFacts(_Facts):
    """What a run was made of.

    Attributes:
        versions: Of Python and of the libraries that compute, by name.
        machine: System, processor and cores of the device.
        model: The model's shape.
        train: The examples to learn from.
        evaluation: Those to measure on.
    """

    versions: dict[str, str]
    machine: str
    model: ModelFacts
    train: DataFacts
    evaluation: DataFacts
