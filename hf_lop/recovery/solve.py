"""Least squares and folding for one output projection: the formulas are in `hf_lop.recovery.by_layer`, this is their arithmetic.

Rows of W are independent of each other. Where wider copies of all of them would take much memory, they are done in blocks,
and where W is not in memory, those blocks are all that is read.
"""

from collections.abc import Callable

import torch

from hf_lop.errors import InvalidInputError
from hf_lop.learning.decoder.sound import finite
from hf_lop.learning.statistics import Statistics
from hf_lop.recovery.gather import gather

DAMPING = 0.1
ROWS = 256  # of W at a time
NEVER_ACTIVE = 1e-9  # share of the mean power below which a neuron counts as never active

NewRows = Callable[[torch.Tensor], torch.Tensor]
"""Makes rows of W'_K `[m, k]`, the new output projection, from the same rows of W `[m, n]`, in their dtype."""

RowSolver = Callable[[int, torch.dtype], NewRows]
"""A recovery of all layers that needs no model: given a layer and the dtype of its output projection, makes its rows anew."""


def in_blocks(new_rows: NewRows, weight: torch.Tensor) -> torch.Tensor:
    """Return W'_K `[d, k]`, made from W `[d, n]` block by block."""
    first = new_rows(weight[:ROWS])
    solved = first.new_empty(len(weight), first.shape[1])
    solved[:ROWS] = first
    for start in range(ROWS, len(weight), ROWS):
        solved[start : start + ROWS] = new_rows(weight[start : start + ROWS])
    return solved


def check_damping(damping: float) -> None:
    """Refuse a damping that is not above 0."""
    if not damping > 0:
        raise InvalidInputError(f"damping is {damping}; it must be above 0, or the fit may have no solution.")


def check_finite(layer: int, solved: torch.Tensor, *, sketched: bool = False) -> torch.Tensor:
    """Return what was made of a layer's output projection, if it is finite.

    Raises:
        InvalidInputError: if not; it says where to look: at the sketch, or at the data.
    """
    if not finite(solved):
        why = (
            "the sketch is damaged. Load it again" if sketched else "activations overflow. Check the calibration data"
        )
        raise InvalidInputError(f"The fit of layer {layer} is not finite: {why}.")
    return solved


def solve(gram: torch.Tensor, cross: torch.Tensor, damping: float, power: float | None = None) -> torch.Tensor:
    """Solve the damped normal equations: return C (G + damping D)^-1 with D = diag(G).

    Args:
        gram (`torch.Tensor`): G `[k, k]`, symmetric.
        cross (`torch.Tensor`): C `[d, k]`, the products of what is to be made up for with the kept neurons.
        damping (`float`): above 0.
        power (`float`, *optional*): mean of D over the layer, by default over G.

    Returns:
        `torch.Tensor`: `[d, k] float64`; not finite where G or C are not.
    """
    inner = gram.to(torch.float64, copy=True)
    diagonal = inner.diagonal().clone()
    if not diagonal.any():
        return torch.zeros_like(cross, dtype=torch.float64)  # no kept neuron was ever active: nothing to fit with
    # G + damping D, where a neuron that was never active gets the least power instead of none, so that the factor exists.
    least = NEVER_ACTIVE * (float(diagonal.mean()) if power is None else power)
    inner.diagonal().add_(damping * diagonal.clamp_min(least))
    # (G + damping D) Z = C^T, since G is symmetric; the factor L L^T of an indefinite G is NaN instead of an exception.
    solved: torch.Tensor = torch.cholesky_solve(cross.double().T, torch.linalg.cholesky_ex(inner).L).T
    return solved


def solve_lstsq(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, damping: float) -> torch.Tensor:
    """Return W'_K `[d, k]` in the dtype and on the device of W; see `recover_lstsq`.

    Args:
        weight (`torch.Tensor`): W `[d, n]`.
        gram (`torch.Tensor`): G `[n, n] float32`.
        kept (`torch.Tensor`): `[k] int64`, ascending.
        damping (`float`): above 0.
    """
    kept = kept.to(gram.device)
    gone = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    gone[kept] = False
    columns = gram.index_select(1, kept)
    cross = weight[:, gone.to(weight.device)].to(gram.device, torch.float64) @ columns[gone].double()  # W_P G_PK
    power = float(gram.diagonal().double().mean())
    change = solve(columns.index_select(0, kept), cross, damping, power)
    stays = weight.index_select(1, kept.to(weight.device))
    return (stays.double() + change.to(weight.device)).to(weight.dtype)


class SketchSolver:
    """Least squares on a sketch, for any rows of one output projection: what all rows share is computed once.

    W'_K = W_K + C S, where C = W_P B_P^T `[d, r]` is what was lost of every direction of the sketch, and
    S = (I + B_K E_K^-1 B_K^T)^-1 B_K E_K^-1 `[r, k]` is how the kept neurons share it; see `recover_sketch`.
    """

    def __init__(
        self,
        directions: torch.Tensor,
        square: torch.Tensor,
        kept: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device | None = None,
        damping: float = DAMPING,
    ) -> None:
        """Prepare for an output projection.

        Args:
            directions (`torch.Tensor`): B `[r, n] float32`.
            square (`torch.Tensor`): the diagonal of G, `[n] float32`.
            kept (`torch.Tensor`): `[k] int64`; the columns of W'_K come in its order.
            dtype (`torch.dtype`): of W.
            device (`torch.device`, *optional*): of W, the CPU by default.
            damping (`float`): above 0.
        """
        device = device or torch.device("cpu")
        self.kept, square = kept.to(device), square.to(device, torch.float64)
        self.share: torch.Tensor | None = None
        if len(kept) == len(square) or not bool(square.any()):
            return  # nothing was removed, or no neuron was ever active
        # Products with W have 13 bits more than a W of 16 bits, 29 more than one of 32.
        self.wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64
        self.sketch = directions.to(device)
        self.share = _share(self.sketch, square, self.kept, damping).to(self.wide)
        gone = torch.ones(len(square), dtype=torch.bool, device=device)
        gone[self.kept] = False
        self.removed = gone.nonzero().flatten()

    def rows(self) -> NewRows:
        """Return what makes new rows from those of W."""
        share = self.share
        if share is None:
            return lambda rows: gather(rows, 1, self.kept)
        lost = self.sketch[:, self.removed].T.contiguous().to(self.wide)  # B_P^T

        def new_rows(rows: torch.Tensor) -> torch.Tensor:
            cross = gather(rows, 1, self.removed).to(self.wide) @ lost  # W_P B_P^T
            return gather(rows, 1, self.kept).to(self.wide).addmm_(cross, share).to(rows.dtype)  # it is a copy already

        return new_rows

    def prefix(self, weight: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
        """Return W'_K where the first k neurons are kept, without the rest of W: W_P B_P^T = W B^T - W_K B_K^T.

        Args:
            weight (`torch.Tensor`): W_K `[d, k]`.
            products (`torch.Tensor`): W B^T `[d, r] float32`, see [`sketch_products`].
        """
        if self.share is None:
            return weight.clone()
        inner = self.sketch[:, self.kept].T.contiguous().to(self.wide)  # B_K^T
        solved = torch.empty_like(weight)
        for start in range(0, len(weight), ROWS):
            rows = slice(start, start + ROWS)
            own = weight[rows].to(self.wide)
            cross = products[rows].to(self.wide) - own @ inner
            solved[rows] = torch.addmm(own, cross, self.share).to(weight.dtype)
        return solved


def _share(sketch: torch.Tensor, square: torch.Tensor, kept: torch.Tensor, damping: float) -> torch.Tensor:
    """Return S = (I + B_K E_K^-1 B_K^T)^-1 B_K E_K^-1 `[r, k] float64`: how the kept neurons share what a direction lost.

    Args:
        sketch (`torch.Tensor`): B `[r, n]`.
        square (`torch.Tensor`): `[n] float64`.
        kept (`torch.Tensor`): `[k] int64`.
        damping (`float`): above 0.
    """
    inner, power = sketch[:, kept].double(), square[kept]  # B_K [r, k], G_jj [k]
    # E_K: what the sketch leaves unexplained of a neuron, and its damping. 4 bits may explain more than there is.
    unexplained = (power - inner.square().sum(0)).clamp_min(0)
    own = unexplained + damping * power.clamp_min(NEVER_ACTIVE * float(square.mean()))
    scaled = inner / own  # B_K E_K^-1
    # (G_KK + damping D)^-1 = (E_K + B_K^T B_K)^-1 by the push-through identity: r equations instead of k,
    # B_K (E_K + B_K^T B_K)^-1 = (I + B_K E_K^-1 B_K^T)^-1 B_K E_K^-1.
    core = torch.eye(len(sketch), dtype=torch.float64, device=sketch.device) + scaled @ inner.T
    # The r equations have k right sides: their inverse is found sooner, and is as good, since no eigenvalue is below 1.
    share: torch.Tensor = torch.cholesky_inverse(torch.linalg.cholesky_ex(core).L) @ scaled
    return share


def solve_sketch(
    weight: torch.Tensor,
    directions: torch.Tensor,
    square: torch.Tensor,
    kept: torch.Tensor,
    damping: float = DAMPING,
) -> torch.Tensor:
    """Return W'_K `[d, k]` of a whole W `[d, n]`, in its dtype and on its device; see `SketchSolver` for the other arguments."""
    return in_blocks(SketchSolver(directions, square, kept, weight.dtype, weight.device, damping).rows(), weight)


def sketch_products(weight: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return W B^T `[d, r] float32`, by which a prefix of W can be recovered without the rest of it.

    Args:
        weight (`torch.Tensor`): W `[d, n]`.
        directions (`torch.Tensor`): B `[r, n] float32`.
    """
    sketch = directions.to(weight.device, torch.float64)
    return torch.cat([rows.double() @ sketch.T for rows in weight.split(ROWS)]).float()


def fold(kept: torch.Tensor, measured: Statistics) -> NewRows:
    """Return what folds the mean of removed neurons into the kept ones, W'_K = W_K + b a^T; see `recover_fold`.

    Args:
        kept (`torch.Tensor`): `[k] int64`, ascending.
        measured (`Statistics`): of the layer.
    """
    mean = measured.mean.double()
    # A neuron that never varies would get all of a; this bounds it by one that varies a millionth of the average.
    variance = measured.fluctuation.double().clamp_min(1e-6 * float(measured.fluctuation.double().mean()))
    direction = (mean / variance)[kept]
    along = mean[kept] @ direction
    if not along > 0 or len(kept) == len(mean):  # no kept neuron has a mean, or nothing was removed
        return lambda rows: gather(rows, 1, kept.to(rows.device))
    share = direction / along  # a, so that a . mu_K = 1

    def new_rows(rows: torch.Tensor) -> torch.Tensor:
        lost = mean_of_removed(rows, mean, kept)  # b
        stays = gather(rows, 1, kept.to(rows.device)).double()
        return stays.addr_(lost, share.to(rows.device)).to(rows.dtype)

    return new_rows


def mean_of_removed(weight: torch.Tensor, mean: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return b = sum_{j in P} mu_j W_{:,j}, `[d] float64`."""
    gone = mean.double().clone()
    gone[kept] = 0
    gone = gone.to(weight.device)
    return torch.cat([weight[start : start + ROWS].double() @ gone for start in range(0, len(weight), ROWS)])
