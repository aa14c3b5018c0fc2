"""The device's model: an ordinary `nn.Module` that any training loop for language models or classifiers can train.

Its parameters are the PEFT modules, and for whole texts a head. Embedding, head and loss are computed here, so neither
text nor labels leave; the frozen blocks run wherever the backbone is. To autograd the whole way through the blocks is
one function, whose backward asks the backbone to walk back.

Shapes: B rows, T positions, N real tokens, M tokens whose final state is wanted, D hidden width, V vocabulary.
May import `backbone`, `peft`, `model`, `device` and libraries.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, final

import torch
from torch.autograd.function import once_differentiable

from tidelock.device.bank import Bank, BankPass
from tidelock.device.causal_lm import DeviceCausalLM, fresh_head, packed_ids
from tidelock.device.in_flight import BatchPass, PassSettings
from tidelock.errors import WireError
from tidelock.model.shared_prefix import common_prefix, share_prefixes
from tidelock.model.walk import Batch
from tidelock.peft.export import apply_adapter, save_adapter
from tidelock.peft.methods import at_sites

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from tidelock.backbone.pass_times import TimeSplit
    from tidelock.backbone.protocol import Backbone, Generation
    from tidelock.model.ends import Ends
    from tidelock.model.rows import Rows
    from tidelock.peft.adapter_files import Adapter
    from tidelock.peft.methods import MethodConfig

# Threads are made when they are needed, so that a batch of few micro-batches makes few.
_MOST_IN_FLIGHT = 32


class _PassContext(Protocol):
    """What the forward pass leaves for the backward pass."""

    run: BatchPass | None


@final
class _ThroughBackbone(torch.autograd.Function):
    """From embeddings to final states; its gradient is that of the PEFT parameters."""

    @staticmethod
    def forward(ctx: _PassContext, run: BatchPass, *_parameters: Tensor) -> Tensor:
        ctx.run = run
        return run.final_MD.to(torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: _PassContext, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        run, ctx.run = ctx.run, None
        if run is None:
            msg = (
                "Backward pass: expected one for each forward pass, got a second one. What the frozen blocks kept is "
                "freed by the first; run the forward pass again."
            )
            raise WireError(msg)
        return (None, *run.backward(grad_MD))


@final
class DeviceModel(DeviceCausalLM):
    """A language model or classifier whose frozen blocks are elsewhere; made by `tidelock.connect`.

    Args:
        ends: The model's embedding and head.
        backbone: Runs the frozen blocks.
        peft_config: What to train: the checked configuration of a method.
        settings: How a batch goes through the blocks; None is as `PassSettings` has it.
        num_labels: How many classes a whole text may have, or 1 where a number is predicted; None models language.

    Attributes:
        peft_config: As given.
        settings: As given.
        bank: The PEFT modules, by block.
    """

    def __init__(
        self,
        ends: Ends,
        backbone: Backbone,
        peft_config: MethodConfig,
        settings: PassSettings | None = None,
        *,
        num_labels: int | None = None,
    ) -> None:
        super().__init__(ends, num_labels)
        self.peft_config = at_sites(peft_config)
        self.bank = Bank(peft_config, ends.geometry)
        self.head = None if num_labels is None else fresh_head(ends.config, ends.geometry, num_labels)
        self.backbone = backbone
        self.settings = settings or PassSettings()
        most = self.settings.in_flight or _MOST_IN_FLIGHT
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="in-flight")

    def final_states(self, ids_BT: Tensor, rows: Rows, select_M: Tensor) -> Tensor:
        """Return the states that the head reads at the selected tokens, shape (M, D)."""
        batches, number_M = self.micro_batches(self.open_batch(ids_BT, rows, select_M))
        # CUDA has one autograd thread a GPU: a pass in another thread would wait for the backward that waits for it.
        at_once = (self.settings.in_flight or self.backbone.passes_at_once()) if self.device.type == "cpu" else 1
        micro_batches = [(batch, self.open_sites()) for batch in batches]
        run = BatchPass(self.backbone, micro_batches, self._threads, min(at_once, len(batches)))
        final_MD: Tensor = _ThroughBackbone.apply(run, *self._trained())  # type: ignore[no-untyped-call]
        return final_MD.to(self.device).index_select(0, number_M.to(self.device))

    def micro_batches(self, batch: Batch) -> tuple[list[Batch], Tensor]:
        """Return what a batch goes through the blocks as, and for each selected token the number of its final state.

        Args:
            batch: With rows that share nothing yet, and selected tokens in ascending order.
        """
        if not self._may_share:
            return batch.split(self.settings.micro_batches), torch.arange(len(batch.select_M))
        return share_prefixes(batch.split(self.settings.micro_batches, common_prefix(batch)))

    def open_generation(self, ids_BT: Tensor, rows: Rows, select_B: Tensor) -> Generation:
        """Run prompts padded at the left through the blocks, which keep keys and values."""
        return self.backbone.generate(self.open_batch(ids_BT, rows, select_B), self.open_sites())

    def save_adapter(self, folder: Path, base_model: str | None = None, *, killed: bool = False) -> None:
        """Write the modules that this model computes with, and its head, as an adapter; see `peft.export`.

        Args:
            folder: Made when it is not there.
            base_model: Folder or hub name of the model, for whoever loads the adapter; None takes where this device
                read it.
            killed: Write killed modules too.

        Raises:
            StorageError: The file system refused.
        """
        base_model = base_model or str(self.ends.folder)
        modules = {site: self.bank.at(site) for site in (self.bank.targets if killed else self.bank.active)}
        save_adapter(modules, self.peft_config, self.ends.geometry, folder, base_model=base_model, head=self.head)

    def load_adapter(self, adapter: Adapter) -> None:
        """Copy an adapter's weights into the modules, which were made from its configuration.

        Raises:
            CheckpointError: Its tensors are not those of the modules.
        """
        modules = {site: self.bank.at(site) for site in self.bank.targets}
        apply_adapter(adapter, modules, self.ends.geometry, self.head)

    def take_times(self) -> TimeSplit:
        """Return what training passes have waited for since the last call, in seconds on the clock."""
        return self.backbone.take_times()

    def close(self) -> None:
        """Let go of the backbone."""
        self.backbone.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def open_batch(self, ids_BT: Tensor, rows: Rows, select_M: Tensor) -> Batch:
        """Return a micro-batch at the cut: embedded, without padding."""
        training = torch.is_grad_enabled() and bool(self._trained())
        # From the global generator, whose state Trainer saves and restores: resumed runs round alike.
        seed = int(torch.randint(2**62, ())) if training else 0
        embeddings_NE = self.ends.embed(packed_ids(ids_BT, rows))
        learns_from = self.bank.learns_from if training else None
        active, frames = self.bank.active, self.bank.frames
        return Batch(embeddings_NE, rows, select_M, active, training, seed, learns_from, frames)

    def open_sites(self) -> BankPass:
        """Return the bank's half of a pass; draws one random number if it will drop out."""
        seed = None
        if self.training and self.bank.has_dropout:
            # From the global generator, whose state Trainer saves and restores: resumed runs draw the same masks.
            seed = int(torch.randint(2**62, ()))
        parameters = self._trained()
        training = torch.is_grad_enabled() and bool(parameters)
        return BankPass(self.bank, parameters, training=training, dropout_seed=seed)

    @property
    def _may_share(self) -> bool:
        """Whether one copy of a token may stand for all: where rows are joined, and none drops out otherwise."""
        drops_out = self.training and self.bank.has_dropout
        return self.settings.share_prefix and self.ends.geometry.family.joins_rows and not drops_out

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.bank.parameters() if parameter.requires_grad]
