"""Inference of the predictors in numpy: one target to the layer ratios, in milliseconds and without torch.

The classes in `hf_lop.learning.predictors` train and say what each layer is for; this computes the same from their weights.
Symbols: L = decoder layers, D = width of the predictor, R = target ratio.
"""

import math
import re
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.planning.budget import Floats

Array = NDArray[np.float32]
Weights = Mapping[str, Array]
HEADS = 4  # of the Transformer, as the paper has it


def predict_ratios(kind: str, weights: Weights, ratio: float, layers: int) -> Floats:
    """Predict the layer ratios for one target.

    Args:
        kind (`str`): "transformer", "bilstm" or "mlp".
        weights (`Mapping`): parameters of the predictor by name, `float32`.
        ratio (`float`): target ratio, in [0, 1].
        layers (`int`): L.

    Returns:
        `np.ndarray`: `[L] float64` in (0, 1); their mean may miss the target.

    Raises:
        InvalidInputError: if the target is none, or there is no such predictor.
        CheckpointMismatchError: if the weights are not those of one.
    """
    if not 0 <= ratio <= 1:  # also NaN
        raise InvalidInputError(f"The target ratio is {ratio}; it must be in [0, 1].")
    if kind not in _KINDS:
        raise InvalidInputError(f"There is no predictor {kind!r}; choose from {', '.join(_KINDS)}.")
    try:
        predicted = _KINDS[kind](weights, np.float32(ratio), layers)
        if predicted.shape != (layers,):
            raise ValueError(f"they predict {predicted.size} layers of {layers}")
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointMismatchError(
            f"The pruner's weights are not those of a predictor {kind!r} ({error}). Take it from its repository again."
        ) from error
    return predicted.astype(np.float64)


def _linear(weights: Weights, name: str, x: Array) -> Array:
    found: Array = weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]
    return found


def _norm(weights: Weights, name: str, x: Array) -> Array:
    centred = x - x.sum() / np.float32(x.size)
    found: Array = centred / np.float32(math.sqrt(centred @ centred / x.size + 1e-5))
    return found * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) is infinite where the result is 0
        found: Array = (1 / (1 + np.exp(-x))).astype(np.float32)
    return found


def _gelu(x: Array) -> Array:
    """X Phi(x), with erf by Abramowitz and Stegun 7.1.26: within 1.5e-7, as numpy has none."""
    z = np.abs(x) * np.float32(math.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.copysign(1 - poly * np.exp(-z * z), x)
    found: Array = (0.5 * x * (1 + erf)).astype(np.float32)
    return found


def _mlp(weights: Weights, ratio: np.float32, _layers: int) -> Array:
    """LOP (arXiv 2506.12826), Eq. 13-15."""
    x = np.array([ratio])
    for layer in ("hidden.0", "hidden.2"):
        x = np.maximum(_linear(weights, layer, x), 0)
    return _sigmoid(_linear(weights, "head", x))


def _bilstm(weights: Weights, ratio: np.float32, layers: int) -> Array:
    """LOP (arXiv 2506.12826), Eq. 16-19."""
    x = _linear(weights, "embed", np.array([ratio]))
    both = [_lstm(weights, x, layers, suffix) for suffix in ("", "_reverse")]
    hidden = np.concatenate([both[0], both[1][::-1]], axis=1)
    found: Array = hidden @ weights["head.weight"].T + weights["head.bias"]
    return _sigmoid(found[:, 0])


def _lstm(weights: Weights, x: Array, steps: int, suffix: str) -> Array:
    """Run an LSTM over copies of one input `[D]`; `[steps, D]`. Gates lie as in torch: input, forget, cell, output."""
    own = {name: weights[f"lstm.{name}_l0{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    entering = own["weight_ih"] @ x + own["bias_ih"] + own["bias_hh"]
    state, cell, found = np.zeros_like(x), np.zeros_like(x), []
    for _ in range(steps):
        gates = (entering + own["weight_hh"] @ state).reshape(4, -1)
        enter, forget, leave = (_sigmoid(gates[index]) for index in (0, 1, 3))
        cell = forget * cell + enter * np.tanh(gates[2])
        state = leave * np.tanh(cell)
        found.append(state)
    return np.stack(found)


def _transformer(weights: Weights, ratio: np.float32, _layers: int) -> Array:
    """LOP (arXiv 2506.12826), Eq. 7-11: layer by layer, each sees the ratios of all before it."""
    latent = _linear(weights, "latent.2", _gelu(_linear(weights, "latent.0", np.array([ratio]))))
    context = latent + weights["layers.weight"]  # token l = latent + embedding_l + linear(r_{l-1})
    layers, dim = context.shape
    depth = 1 + max(int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name)))
    blocks = [_block(weights, f"blocks.{index}", layers, dim) for index in range(depth)]
    found = np.zeros(layers + 1, np.float32)  # r_0 = 0
    for position in range(layers):
        x = context[position] + _linear(weights, "previous", found[position : position + 1])
        for block in blocks:
            x = block(x, position)
        found[position + 1] = _sigmoid(_linear(weights, "head", _norm(weights, "norm", x)))[0]
    return found[1:]


def _block(weights: Weights, name: str, layers: int, dim: int) -> Callable[[Array, int], Array]:
    """Return a Transformer block as a function of one token `[D]` and its position, that remembers keys and values."""
    keys, values = np.empty((2, HEADS, layers, dim // HEADS), np.float32)
    own = {key.removeprefix(f"{name}."): weight for key, weight in weights.items() if key.startswith(f"{name}.")}
    scale = np.float32(1 / math.sqrt(dim // HEADS))

    def step(x: Array, position: int) -> Array:
        query, keys[:, position], values[:, position] = _linear(own, "qkv", _norm(own, "norm_in", x)).reshape(
            3, HEADS, -1
        )
        scores = np.matmul(keys[:, : position + 1], query[..., None])[..., 0] * scale  # [heads, position + 1]
        shares = np.exp(scores - scores.max(1, keepdims=True))
        mixed = np.matmul(shares[:, None], values[:, : position + 1])[:, 0] / shares.sum(1, keepdims=True)
        x = x + _linear(own, "out", mixed.reshape(-1))
        return x + _linear(own, "down", _gelu(_linear(own, "up", _norm(own, "norm_ffn", x))))

    return step


_KINDS = {"transformer": _transformer, "bilstm": _bilstm, "mlp": _mlp}
