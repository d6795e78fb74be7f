"""Running a part of a decoder: layers that compute what they did before are skipped, later ones are never started."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from hf_lop.learning.decoder.replay import nearly_equal
from hf_lop.units.decoder import text_decoder
from hf_lop.units.unit import Unit

Result = TypeVar("Result")


def layer_of(model: nn.Module, unit: Unit) -> nn.Module:
    """Return the decoder layer that an FFN is in: the entry of the outermost list of modules on its path."""
    decoder = text_decoder(model)
    module, inside = model, model is decoder
    for name in unit.path.split("."):
        parent, module = module, module.get_submodule(name)
        if inside and isinstance(parent, nn.ModuleList):
            break
        inside = inside or module is decoder
    return module


def _clone(output: Any) -> Any:
    """Copy a layer's output, as decoders may add to it in place."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    return tuple(_clone(part) for part in output) if isinstance(output, tuple) else output


class _Stop(Exception):
    """Ends a forward pass behind a layer."""


class LayerRuns:
    """The decoder layers of a shadow model, run in parts.

    Attributes:
        layers (`list[nn.Module]`): `[L]`, in the order of the FFNs.
        rank (`list[int]`): `[L]`, when each layer runs (0 is first), from the last `record`; empty where some layer did
            not run exactly once, so that none can be skipped.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        """Take the layers of a shadow model (see [`shadow`]); their `forward` is replaced for the time of a run."""
        self.layers = [layer_of(model, unit) for unit in units]
        self.rank: list[int] = []

    def record(self, run: Callable[[], Result]) -> tuple[Result, list[Any]]:
        """Run all layers, and return the result and each layer's output, `[L]` (empty if none can be skipped)."""
        seen: list[tuple[int, Any]] = []

        def note(index: int) -> Callable[..., None]:
            return lambda _layer, _args, output: seen.append((index, _clone(output)))

        handles = [layer.register_forward_hook(note(index)) for index, layer in enumerate(self.layers)]
        try:
            result = run()
        finally:
            for handle in handles:
                handle.remove()
        ran = [index for index, _ in seen]
        if sorted(ran) != list(range(len(self.layers))):
            self.rank = []
            return result, []
        self.rank = [ran.index(index) for index in range(len(self.layers))]
        return result, [output for _, output in sorted(seen, key=lambda entry: entry[0])]

    def before(self, layer: int) -> int | None:
        """Return the layer that runs just before another one."""
        rank = self.rank[layer]
        return self.rank.index(rank - 1) if rank else None

    @contextlib.contextmanager
    def skipping(self, layer: int, output: Any) -> Iterator[None]:
        """Skip all layers that run before `layer`: each returns a copy of `output`, that of the one just before it."""
        skipped = [self.layers[i] for i, rank in enumerate(self.rank) if rank < self.rank[layer]]
        own = [vars(module).get("forward") for module in skipped]
        try:
            for module in skipped:
                module.forward = lambda *_args, **_kwargs: _clone(output)
            yield
        finally:
            for module, forward in zip(skipped, own, strict=True):
                if forward is not None:
                    module.forward = forward
                else:
                    vars(module).pop("forward", None)

    def until(self, layer: int, run: Callable[[], Any]) -> Any:
        """Run as far as `layer`, and return its output."""
        outputs: list[Any] = []

        def stop(_layer: nn.Module, _args: Any, output: Any) -> None:
            outputs.append(_clone(output))
            raise _Stop

        handle = self.layers[layer].register_forward_hook(stop)
        try:
            with contextlib.suppress(_Stop):
                run()
        finally:
            handle.remove()
        return outputs[0]

    def skips_exactly(self, run: Callable[[], torch.Tensor], result: torch.Tensor, outputs: Sequence[Any]) -> bool:
        """Whether `run` gives the same result with layers skipped: not so where a layer leaves something for a later one."""
        if not outputs or len(outputs) == 1:
            return bool(outputs)
        last = self.rank.index(len(outputs) - 1)
        for layer in {self.rank.index(len(outputs) // 2), last}:
            before = self.before(layer)
            try:
                with self.skipping(layer, outputs[before] if before is not None else None):
                    again = run()
            except Exception:  # a layer misses what a skipped one should have left
                return False
            if not nearly_equal(again, result):
                return False
        return True
