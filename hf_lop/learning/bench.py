"""A dense model made ready to judge its plans: any widths at once, on batches that wait at the decoder's door."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hf_lop.learning.decoder.replay import Recorded, record_batches
from hf_lop.learning.processes import Processes
from hf_lop.units.unit import Unit
from hf_lop.units.views import ElasticModel, OutputWeights


class Bench:
    """What probes and rewards of one model share, each part made when it is first asked for.

    Attributes:
        processes (`Processes`): those that share the batches; all of them make and use this together.
    """

    def __init__(
        self,
        model: nn.Module,
        order: Sequence[torch.Tensor],
        batches: Iterable[Mapping[str, Any]],
        processes: Processes | None = None,
        outputs: OutputWeights | None = None,
        units: Sequence[Unit] | None = None,
    ) -> None:
        """Name the parts; nothing is computed yet.

        Args:
            model (`nn.Module`): the dense model; only read, see [`ElasticModel`] for the memory this takes.
            order (`Sequence[torch.Tensor]`): pieces of each unit from most to least important, `[n] int64`.
            batches (`Iterable[Mapping]`): validation batches of model inputs. With `labels` `[B, T]` (-100 outside of
                the answers) only answers count, see [`predictions`][hf_lop.learning.decoder.replay.predictions].
            processes (`Processes`, *optional*): those that share the batches; all of them pass the same.
            outputs (`Callable`, *optional*): output projections of cut layers, see [`ElasticModel`].
            units (`Sequence[Unit]`, *optional*): those of the model, where they were found already.
        """
        self.processes = processes or Processes()
        self._parts, self._batches = (model, order, outputs, units), batches

    @cached_property
    def elastic(self) -> ElasticModel:
        """The model with sorted pieces, whose widths can be set."""
        return ElasticModel(*self._parts)

    @cached_property
    def recorded(self) -> list[Recorded]:
        """The batches of this process: its vision tower and its dense model run once on each."""
        self.elastic.set_widths([unit.count for unit in self.elastic.units])
        return record_batches(self.elastic.model, self._batches, self.processes)
