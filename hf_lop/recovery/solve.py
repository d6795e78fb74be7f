"""What recovery makes of one output projection: the formulas are in `hf_lop.recovery.by_layer`, this is their arithmetic.

Rows of W are independent of each other. Where wider copies of all of them would take much memory, they are done in blocks,
and where W is not in memory, those blocks are all that is read: `RowFit` makes the new rows from the old ones.
"""

from collections.abc import Callable

import torch

from hf_lop.learning.statistics import Statistics
from hf_lop.units.gather import gather

DAMPING = 0.1
ROWS = 256  # of W at a time

RowFit = Callable[[torch.Tensor], torch.Tensor]  # some rows of W `[m, n]` -> those of W'_K `[m, k]`, in the dtype of W


def fit_rows(fit: RowFit, weight: torch.Tensor) -> torch.Tensor:
    """Return W'_K `[d, k]`, made from W `[d, n]` block by block."""
    first = fit(weight[:ROWS])
    fitted = first.new_empty(len(weight), first.shape[1])
    fitted[:ROWS] = first
    for start in range(ROWS, len(weight), ROWS):
        fitted[start : start + ROWS] = fit(weight[start : start + ROWS])
    return fitted


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for products with W: it has 13 bits more than a W of 16 bits, 29 more than one of 32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


def fit_lstsq(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, damping: float) -> torch.Tensor:
    """Return W'_K `[d, k]` in the dtype and on the device of W; see `recover_lstsq`.

    Args:
        weight (`torch.Tensor`): W `[d, n]`.
        gram (`torch.Tensor`): G `[n, n] float32`.
        kept (`torch.Tensor`): `[k] int64`, ascending.
        damping (`float`): above 0.
    """
    kept = kept.to(gram.device)
    stays = weight.index_select(1, kept.to(weight.device))
    diagonal = gram.diagonal().double()
    if not diagonal.any():
        return stays  # no neuron was ever active: nothing to fit to
    gone = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    gone[kept] = False
    columns = gram.index_select(1, kept)
    inner = columns.index_select(0, kept).double()
    # A neuron that was never active gets the least scale instead of none, so that the factor exists.
    inner.diagonal().add_(damping * diagonal[kept].clamp_min(1e-9 * float(diagonal.mean())))
    cross = weight[:, gone.to(weight.device)].to(gram.device, torch.float64) @ columns[gone].double()
    change = torch.cholesky_solve(cross.T, torch.linalg.cholesky_ex(inner).L).T
    return (stays.double() + change.to(weight.device)).to(weight.dtype)


def fit_sketch(
    weight: torch.Tensor,
    directions: torch.Tensor,
    square: torch.Tensor,
    kept: torch.Tensor,
    damping: float = DAMPING,
) -> torch.Tensor:
    """Return W'_K of one layer, `[d, k]` in the dtype and on the device of W; see `recover_sketch`.

    Args:
        weight (`torch.Tensor`): W `[d, n]`.
        directions (`torch.Tensor`): B `[r, n] float32`.
        square (`torch.Tensor`): the diagonal of G, `[n] float32`.
        kept (`torch.Tensor`): `[k] int64`; the columns come in its order.
        damping (`float`): above 0.
    """
    return fit_rows(sketch_rows(directions, square, kept, damping, weight.dtype, weight.device), weight)


def sketch_rows(
    directions: torch.Tensor,
    square: torch.Tensor,
    kept: torch.Tensor,
    damping: float,
    dtype: torch.dtype,
    device: torch.device,
) -> RowFit:
    """Return `fit_sketch` for some rows of a W of this dtype on this device; what all rows share is computed once."""
    kept, square = kept.to(device), square.to(device, torch.float64)
    if len(kept) == len(square) or not bool(square.any()):
        return lambda rows: gather(rows, 1, kept)
    sketch = directions.to(device)
    gone = torch.ones(len(square), dtype=torch.bool, device=device)
    gone[kept] = False
    removed = gone.nonzero().flatten()
    wide = _arithmetic(dtype)
    spread = _spread(sketch, square, kept, damping).to(wide)
    lost = sketch[:, removed].T.contiguous().to(wide)

    def fit(rows: torch.Tensor) -> torch.Tensor:
        cross = gather(rows, 1, removed).to(wide) @ lost
        return gather(rows, 1, kept).to(wide).addmm_(cross, spread).to(dtype)  # it is a copy already

    return fit


def _spread(sketch: torch.Tensor, square: torch.Tensor, kept: torch.Tensor, damping: float) -> torch.Tensor:
    """Return (I + B_K E_K^-1 B_K^T)^-1 B_K E_K^-1 `[r, k] float64`: how the kept neurons share what a direction lost.

    Args:
        sketch (`torch.Tensor`): B `[r, n]`.
        square (`torch.Tensor`): `[n] float64`.
        kept (`torch.Tensor`): `[k] int64`.
        damping (`float`): above 0.
    """
    inner, power = sketch[:, kept].double(), square[kept]
    own = (power - inner.square().sum(0)).clamp_min(0) + damping * power.clamp_min(1e-9 * float(square.mean()))
    scaled = inner / own
    core = torch.eye(len(sketch), dtype=torch.float64, device=sketch.device) + scaled @ inner.T
    # The r equations have k right sides: their inverse is found sooner, and is as good, since no eigenvalue is below 1.
    spread: torch.Tensor = torch.cholesky_inverse(torch.linalg.cholesky_ex(core).L) @ scaled
    return spread


def sketch_products(weight: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return W B^T `[d, r] float32`, by which a prefix of W can be recovered without the rest of it.

    Args:
        weight (`torch.Tensor`): W `[d, n]`.
        directions (`torch.Tensor`): B `[r, n] float32`.
    """
    sketch = directions.to(weight.device, torch.float64)
    return torch.cat([rows.double() @ sketch.T for rows in weight.split(ROWS)]).float()


def fit_sketch_prefix(
    weight: torch.Tensor,
    products: torch.Tensor,
    directions: torch.Tensor,
    square: torch.Tensor,
    *,
    damping: float = DAMPING,
) -> torch.Tensor:
    """Return what `fit_sketch` does where the first k neurons are kept: what the others lost is W_P B_P^T = W B^T - W_K B_K^T.

    Args:
        weight (`torch.Tensor`): W_K `[d, k]`.
        products (`torch.Tensor`): W B^T `[d, r] float32`, see [`sketch_products`].
        directions (`torch.Tensor`): B `[r, n] float32`.
        square (`torch.Tensor`): the diagonal of G, `[n] float32`.
        damping (`float`): above 0.
    """
    width = weight.shape[1]
    square = square.to(weight.device, torch.float64)
    if width == len(square) or not bool(square.any()):
        return weight.clone()
    sketch = directions.to(weight.device, torch.float64)
    wide = _arithmetic(weight.dtype)
    spread = _spread(sketch, square, torch.arange(width, device=weight.device), damping).to(wide)
    inner = sketch[:, :width].T.contiguous().to(wide)
    fitted = torch.empty_like(weight)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        own = weight[rows].to(wide)
        fitted[rows] = torch.addmm(own, products[rows].to(wide) - own @ inner, spread).to(weight.dtype)
    return fitted


def fit_fold(weight: torch.Tensor, kept: torch.Tensor, measured: Statistics) -> torch.Tensor:
    """Return W'_K of one layer, `[d, k]` in the dtype and on the device of W; see `recover_fold`.

    Args:
        weight (`torch.Tensor`): W `[d, n]`.
        kept (`torch.Tensor`): `[k] int64`, ascending.
        measured (`Statistics`): of the layer.
    """
    return fit_rows(fold_rows(kept, measured), weight)


def fold_rows(kept: torch.Tensor, measured: Statistics) -> RowFit:
    """Return `fit_fold` for some rows of W."""
    mean = measured.mean.double()
    # A neuron that never varies would get all of a; this bounds it by one that varies a millionth of the average.
    variance = measured.fluctuation.double().clamp_min(1e-6 * float(measured.fluctuation.double().mean()))
    direction = (mean / variance)[kept]
    along = mean[kept] @ direction
    if not along > 0 or len(kept) == len(mean):  # no kept neuron has a mean, or nothing was removed
        return lambda rows: gather(rows, 1, kept.to(rows.device))
    share = direction / along

    def fit(rows: torch.Tensor) -> torch.Tensor:
        lost = mean_of_removed(rows, mean, kept)
        stays = gather(rows, 1, kept.to(rows.device)).double()
        return stays.addr_(lost, share.to(rows.device)).to(rows.dtype)

    return fit


def mean_of_removed(weight: torch.Tensor, mean: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return b = sum_{j in P} mu_j W_{:,j}, `[d] float64`."""
    gone = mean.double().clone()
    gone[kept] = 0
    gone = gone.to(weight.device)
    return torch.cat([weight[start : start + ROWS].double() @ gone for start in range(0, len(weight), ROWS)])
