"""A sketch of the second moments of every layer, small enough to be kept: what least squares without data needs.

With X `[T, n]` the activations of a layer at all tokens of N samples, G = X^T X / N is kept as its diagonal, the statistic
`square`, and as the r directions B `[r, n]` that explain most of the correlations between neurons:

    G ~ B^T B + diag(square - diag(B^T B))

B is found in one pass, without G: for random test vectors O `[n, p]`, Y = G O is a sum over tokens, so it depends neither on
the size of batches nor, up to rounding, on their order, and the sums of several processes add up. Then G ~ Y (O^T Y)^+ Y^T
(Nyström), of which the r leading directions in units of each neuron's root mean square are B.

B is stored with 4 bits per number and one scale per neuron, after a random rotation of the r directions, which changes
nothing in B^T B but makes all numbers of a neuron equally large.

Source: J. Tropp, A. Yurtsever, M. Udell, V. Cevher: Fixed-rank approximation of a positive-semidefinite matrix from
streaming data (arXiv 1706.05736).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_lop.errors import InvalidInputError
from hf_lop.learning.processes import Processes
from hf_lop.learning.statistics import Statistics

SKETCH_ROWS = 128  # the default; examples/benchmarks/results/sketch.md has what other sizes keep
OVERSAMPLING = 4  # test vectors per direction
STEP = 0.3352  # of a 4-bit uniform quantiser for a normal distribution, in standard deviations (J. Max, 1960)
RESOLUTION = 1e-6  # share of the largest eigenvalue below which float32 sums hold noise only


def check_rows(rows: int) -> int:
    """Return a number of directions that can be stored.

    Raises:
        InvalidInputError: if it is no even integer from 0.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0 or rows % 2:
        raise InvalidInputError(f"sketch_rows is {rows!r}; pass an even number of directions, or 0 for no sketch.")
    return rows


@dataclass(frozen=True, slots=True)
class Sketch:
    """The stored directions of one layer.

    Attributes:
        codes (`torch.Tensor`): `[n, r / 2] uint8`, two numbers of 4 bits in a byte.
        scale (`torch.Tensor`): `[n] float32`, the step between neighbouring numbers of a neuron.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, directions: torch.Tensor) -> "Sketch":
        """Store directions `[r, n]`, r even."""
        rows = len(directions)
        # (Q B)^T (Q B) = B^T B, and a neuron's r numbers, which fall off steeply in B, are all alike in Q B.
        rotated = (_rotation(rows).T @ directions.double().cpu()).T
        scale = (STEP * rotated.square().mean(1).sqrt()).float()
        # Cell i of -8 to 7 is [i s, (i + 1) s), s the scale; it is read as its middle, (i + 1/2) s.
        levels = (rotated / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).floor().clamp(-8, 7)
        codes = (levels + 8).to(torch.uint8)
        return cls(codes[:, 0::2] | codes[:, 1::2] << 4, scale)

    def directions(self) -> torch.Tensor:
        """Return B, rotated, `[r, n] float32`: its products B^T B are what is meant."""
        levels = torch.stack([self.codes & 15, self.codes >> 4], dim=2).flatten(1)
        return ((levels.float() - 7.5) * self.scale.float().unsqueeze(1)).T


def _rotation(size: int) -> torch.Tensor:
    """A random rotation `[size, size] float64`, always the same."""
    normal = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    # The seed is the size: the rotation needs no place in the file, as only B^T B is read from it.
    rotation: torch.Tensor = torch.linalg.qr(normal).Q
    return rotation


class Sketcher:
    """Sums up Y = X^T X O of every layer, batch by batch."""

    def __init__(self, widths: Sequence[int], rows: int, *, seed: int = 0) -> None:
        """Prepare for L layers.

        Args:
            widths (`Sequence[int]`): neurons of every layer.
            rows (`int`): r, directions to keep per layer; even. No more are kept than there are neurons.
            seed (`int`): of the test vectors.
        """
        self.rows = min(check_rows(rows), max(widths) + max(widths) % 2)
        self.samples, self.tokens = [0] * len(widths), [0] * len(widths)
        self._tests = {width: self._test(width, seed) for width in widths}
        self._sums: list[torch.Tensor] = [torch.zeros_like(self._tests[width]) for width in widths]

    def _test(self, width: int, seed: int) -> torch.Tensor:
        count = OVERSAMPLING * self.rows
        if count >= width:
            return torch.eye(width)  # then Y is G itself
        return torch.randn(width, count, generator=torch.Generator().manual_seed(seed))

    def add(self, layer: int, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add activations `[B, T, n]` of one layer, with an optional token mask `[B, T] bool`."""
        tokens = (x.flatten(0, 1) if mask is None else x[mask]).float()
        test = self._tests[tokens.shape[1]] = self._tests[tokens.shape[1]].to(tokens.device)
        total = self._sums[layer] = self._sums[layer].to(tokens.device)
        total.addmm_(tokens.T, tokens @ test)  # Y += X^T (X O): p n numbers, where G has n^2
        self.samples[layer] += len(x)
        self.tokens[layer] += len(tokens)

    def join(self, processes: Processes) -> None:
        """Add up what several processes have, layer by layer; the last digits may differ from those of one process."""
        if processes.count == 1:
            return
        for layer in range(len(self._sums)):

            def own(layer: int = layer) -> tuple[torch.Tensor, int, int]:
                return self._sums[layer].cpu(), self.samples[layer], self.tokens[layer]

            totals, samples, tokens = zip(*processes.gather(own), strict=True)
            self._sums[layer] = torch.stack(totals).sum(0)
            self.samples[layer], self.tokens[layer] = sum(samples), sum(tokens)

    def result(self, statistics: Sequence[Statistics]) -> list[torch.Tensor]:
        """Return the directions of every layer, `[r, n] float32` on the CPU; those beyond n are zero.

        Args:
            statistics (`Sequence[Statistics]`): of the same samples; they give each neuron its unit.
        """
        found = []
        for total, samples, measured in zip(self._sums, self.samples, statistics, strict=True):
            found.append(self._leading(total.cpu().double() / samples, measured.square.double()))
        return found

    def _leading(self, products: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Return the directions of one layer from Y `[n, p]` and the diagonal of G."""
        unit = square.sqrt()  # root mean square u of every neuron: loud neurons must not decide which directions lead
        inverse = torch.where(unit > 0, 1 / unit, 0.0)
        test = self._tests[len(products)].cpu().double()
        core = test.T @ products
        if len(core) == len(unit):  # G itself
            # U^-1 G U^-1 = V diag(values) V^T, ascending: correlations; their leading part is the sketch
            values, vectors = torch.linalg.eigh((core + core.T) / 2 * inverse * inverse[:, None])
            leading = values[-self.rows :].clamp_min(0).sqrt() * vectors[:, -self.rows :]
        else:
            # Nyström: G ~ Y (O^T Y)^+ Y^T, and O^T Y = V diag(values) V^T, so that U^-1 G U^-1 ~ F F^T with
            # F = U^-1 Y V diag(values)^-1/2, without what only rounding has made of small values.
            values, vectors = torch.linalg.eigh((core + core.T) / 2)
            real = values > RESOLUTION * values[-1].clamp_min(torch.finfo(torch.float32).tiny)
            factor = inverse[:, None] * (products @ vectors[:, real]) / values[real].sqrt()  # G ~ factor factor^T
            # F R, R the eigenvectors of F^T F `[p, p]`: its columns are those of F F^T `[n, n]`, times their singular values
            leading = factor @ torch.linalg.eigh(factor.T @ factor).eigenvectors[:, -self.rows :]
        directions = torch.zeros(self.rows, len(unit), dtype=torch.float64)
        # B = (U leading)^T, the most important direction first
        directions[: leading.shape[1]] = (leading * unit[:, None]).T.flip(0)
        return directions.float()
