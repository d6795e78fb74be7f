"""What recovery makes of one output projection: the formulas are in `hf_lop.ffn.recovery`, this is their arithmetic.

Rows of W are independent of each other. Where float64 copies of all of them would take much memory, they are done in blocks.
"""

import torch

from hf_lop.ffn.statistics import Statistics

DAMPING = 0.1
ROWS = 256  # of W at a time


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
    kept = kept.to(weight.device)
    square = square.to(weight.device, torch.float64)
    fitted = weight.index_select(1, kept)
    if len(kept) == weight.shape[1] or not bool(square.any()):
        return fitted
    sketch = directions.to(weight.device, torch.float64)
    gone = torch.ones(len(square), dtype=torch.bool, device=weight.device)
    gone[kept] = False
    removed = gone.nonzero().flatten()
    spread = _spread(sketch, square, kept, damping)
    lost = sketch[:, removed].T.contiguous()
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        cross = weight[rows].index_select(1, removed).double() @ lost
        fitted[rows] = (fitted[rows].double() + cross @ spread).to(weight.dtype)
    return fitted


def _spread(sketch: torch.Tensor, square: torch.Tensor, kept: torch.Tensor, damping: float) -> torch.Tensor:
    """Return (I + B_K E_K^-1 B_K^T)^-1 B_K E_K^-1 `[r, k] float64`: how the kept neurons share what a direction lost."""
    own = (square - sketch.square().sum(0)).clamp_min(0) + damping * square.clamp_min(1e-9 * float(square.mean()))
    inner, scaled = sketch[:, kept], sketch[:, kept] / own[kept]
    core = torch.eye(len(sketch), dtype=torch.float64, device=sketch.device) + scaled @ inner.T
    spread: torch.Tensor = torch.linalg.solve(core, scaled)
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
    spread = _spread(sketch, square, torch.arange(width, device=weight.device), damping)
    inner = sketch[:, :width].T.contiguous()
    fitted = torch.empty_like(weight)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        own = weight[rows].double()
        fitted[rows] = (own + (products[rows].double() - own @ inner) @ spread).to(weight.dtype)
    return fitted


def fit_fold(weight: torch.Tensor, kept: torch.Tensor, measured: Statistics) -> torch.Tensor:
    """Return W'_K of one layer, `[d, k]` in the dtype and on the device of W; see `recover_fold`.

    Args:
        weight (`torch.Tensor`): W `[d, n]`.
        kept (`torch.Tensor`): `[k] int64`, ascending.
        measured (`Statistics`): of the layer.
    """
    mean = measured.mean.double()
    # A neuron that never varies would get all of a; this bounds it by one that varies a millionth of the average.
    variance = measured.fluctuation.double().clamp_min(1e-6 * float(measured.fluctuation.double().mean()))
    direction = (mean / variance)[kept]
    along = mean[kept] @ direction
    fitted = weight.index_select(1, kept.to(weight.device))
    if not along > 0 or len(kept) == weight.shape[1]:  # no kept neuron has a mean, or nothing was removed
        return fitted
    share = (direction / along).to(weight.device)
    lost = mean_of_removed(weight, mean, kept)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        fitted[rows] = (fitted[rows].double() + torch.outer(lost[rows], share)).to(weight.dtype)
    return fitted


def mean_of_removed(weight: torch.Tensor, mean: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return b = sum_{j in P} mu_j W_{:,j}, `[d] float64`."""
    gone = mean.double().clone()
    gone[kept] = 0
    gone = gone.to(weight.device)
    return torch.cat([weight[start : start + ROWS].double() @ gone for start in range(0, len(weight), ROWS)])
