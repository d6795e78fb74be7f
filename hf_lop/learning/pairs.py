"""Tables of (target, layer ratios): reading them, and the pairs that a predictor learns from them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_lop.errors import InvalidInputError


def training_pairs(table: Sequence[Mapping[str, Any]], layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a table into the predictor's training set: its rows, and 256 targets interpolated between them.

    A search gives some 25 rows, too few for the paper's 64 epochs of 40 pairs; neighbouring rows differ little, so the
    line between them is what the predictor should learn there. Removing nothing, ratio 0, is known without a row.

    Args:
        table (`Sequence[Mapping]`): rows `{"ratio": R, "ratios": [L floats]}`; further keys are ignored.
        layers (`int`): L.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: targets `[N] float32` and layer ratios `[N, L] float32`.

    Raises:
        InvalidInputError: if there is no row, or one does not fit the model.
    """
    if not table:
        raise InvalidInputError("There is no table of (R, layer ratios) to train on. Pass one, or fit a pruner anew.")
    for index, row in enumerate(table):
        try:
            values = np.array([row["ratio"], *row["ratios"]], dtype=np.float64)
            fits = len(values) == 1 + layers and bool(((values >= 0) & (values <= 1)).all())
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise InvalidInputError(
                f'Row {index} of the table is {row}; it must be {{"ratio": R, "ratios": [{layers} numbers]}}, '
                "all of them fractions from 0 to 1."
            )
    rows = {0.0: [0.0] * layers} | {float(row["ratio"]): list(row["ratios"]) for row in table}
    known = np.array(sorted(rows))
    values = np.array([rows[target] for target in known.tolist()])
    targets = np.unique(np.concatenate([known, np.linspace(0.0, known[-1], 256)]))
    ratios = np.stack([np.interp(targets, known, column) for column in values.T], axis=1)
    return torch.tensor(targets, dtype=torch.float32), torch.tensor(ratios, dtype=torch.float32)


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON list of `{"ratio": R, "ratios": [L floats]}` for [`~LOPPruner.train_predictor`].

    Raises:
        InvalidInputError: if the file cannot be read, or holds something else.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read as JSON ({error}). Pass a JSON list of rows.") from error
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        raise InvalidInputError(f'{path} must hold a list of rows {{"ratio": R, "ratios": [one number per layer]}}.')
    return table
