"""Predictors: from a target ratio to the pruning ratio of every layer, trained on (target, ratios) pairs of a search.

Symbols: B = batch of targets, L = decoder layers, D = width of the predictor, R = target ratio, r_l = ratio of layer
l, N = pairs.
Sources: LOP (arXiv 2506.12826), Sec. 4.3 and appendix A.1.
"""

import abc

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_lop.errors import InvalidInputError
from hf_lop.planning.budget import Floats
from hf_lop.planning.predict import HEADS


class RatioPredictor(nn.Module, abc.ABC):
    """Base of the predictors: `forward` predicts, `teacher_forced` is what training differentiates.

    Args:
        num_layers: L, decoder layers of the model to prune.
        dim: Width D of the predictor.
    """

    def __init__(self, num_layers: int, dim: int) -> None:
        super().__init__()
        if num_layers < 1 or dim < 1:
            raise InvalidInputError(f"num_layers is {num_layers} and dim {dim}; both must be at least 1.")
        self.num_layers = num_layers

    @abc.abstractmethod
    def forward(self, targets: Tensor) -> Tensor:
        """Predict the ratios of all layers.

        Args:
            targets: Target ratios R `[B] float32`, each in [0, 1].

        Returns:
            Layer ratios `[B, L] float32` in (0, 1). Their mean is near R; `allocation.project` meets it exactly.

        Raises:
            InvalidInputError: If `targets` is empty, has another shape, or holds NaN or a value outside [0, 1].
        """

    def teacher_forced(self, targets: Tensor, ratios: Tensor) -> Tensor:
        """Predict `[B, L] float32` from targets `[B]` and true `ratios` `[B, L]`, which only the Transformer sees."""
        predicted: Tensor = self(targets)
        return predicted

    def _column(self, targets: Tensor) -> Tensor:
        """Return checked targets as `[B, 1]`, in the dtype of the weights."""
        if targets.ndim != 1:
            raise InvalidInputError(f"targets has shape {tuple(targets.shape)}; pass one target ratio each, [B].")
        _check_fractions("targets", targets)
        return targets[:, None].to(next(self.parameters()).dtype)


class TransformerPredictor(RatioPredictor):
    """The paper's predictor: ratios are generated layer by layer, from first to last.

    Step l sees the latent of R (a two-layer MLP), a learnable embedding of layer l and the ratios of all layers before
    it: token l = latent + embedding_l + linear(r_{l-1}), with causal self-attention over tokens 1..l and r_0 = 0; then
    r_l = sigmoid(w h_l + b). Training feeds the true previous ratios to all steps in one parallel pass. Plans are made by
    [`predict_ratios`][hf_lop.planning.predict.predict_ratios], which caches keys and values.

    The paper says two things: Sec. 4.3 describes this autoregressive model, appendix A.1 an encoder over the embedded
    target and learned positions and mentions no previous ratios. This is Sec. 4.3, with the sizes of A.1. Where layer
    normalisation sits is not stated; here it precedes each sub-layer.

    Args:
        num_layers: L, decoder layers of the model to prune.
        dim: Width D of the predictor.
        depth: Number of Transformer blocks.
        heads: Attention heads; must divide `dim`.

    Source: LOP (arXiv 2506.12826), Eq. 7-11.
    """

    def __init__(self, num_layers: int, dim: int = 128, depth: int = 2, heads: int = HEADS) -> None:
        super().__init__(num_layers, dim)
        if heads < 1 or dim % heads:
            raise InvalidInputError(f"dim is {dim} and heads {heads}; heads must divide dim.")
        self.latent = nn.Sequential(nn.Linear(1, dim), nn.GELU(), nn.Linear(dim, dim))
        self.layers = nn.Embedding(num_layers, dim)
        self.previous = nn.Linear(1, dim)
        self.blocks = nn.ModuleList(_Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1)

    def forward(self, targets: Tensor) -> Tensor:
        """See `RatioPredictor.forward`; one pass per layer, without gradients (train with `teacher_forced`)."""
        with torch.no_grad():
            ratios = torch.zeros(len(targets), self.num_layers, device=targets.device)
            for layer in range(self.num_layers):
                ratios[:, layer] = self.teacher_forced(targets, ratios)[:, layer]
        return ratios

    def teacher_forced(self, targets: Tensor, ratios: Tensor) -> Tensor:
        """See `RatioPredictor.teacher_forced`; one causal pass over all layers."""
        context = self._context(targets)
        before = F.pad(ratios.to(context.dtype), (1, -1))
        x = context + self.previous(before[..., None])
        for block in self.blocks:
            x = block(x)
        return torch.sigmoid(self.head(self.norm(x)))[..., 0].float()

    def _context(self, targets: Tensor) -> Tensor:
        latent: Tensor = self.latent(self._column(targets))
        return latent[:, None] + self.layers.weight


class _Block(nn.Module):
    """Pre-norm Transformer block over `[B, L, D]`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_in = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm_ffn = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm_in(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden: Tensor = self.down(F.gelu(self.up(self.norm_ffn(x))))
        return x + hidden


class BiLSTMPredictor(RatioPredictor):
    """The paper's recurrent ablation: an LSTM of width D reads L copies of the embedded R in both directions.

    Source: LOP (arXiv 2506.12826), Eq. 16-19.
    """

    def __init__(self, num_layers: int, dim: int = 128) -> None:
        super().__init__(num_layers, dim)
        self.embed = nn.Linear(1, dim)
        self.lstm = nn.LSTM(dim, dim, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * dim, 1)

    def forward(self, targets: Tensor) -> Tensor:
        """See `RatioPredictor.forward`."""
        copies = self.embed(self._column(targets))[:, None].expand(-1, self.num_layers, -1)
        hidden, _ = self.lstm(copies)
        return torch.sigmoid(self.head(hidden))[..., 0].float()


class MLPPredictor(RatioPredictor):
    """The paper's plain ablation: two hidden ReLU layers of width D, from R to all ratios at once.

    Source: LOP (arXiv 2506.12826), Eq. 13-15.
    """

    def __init__(self, num_layers: int, dim: int = 128) -> None:
        super().__init__(num_layers, dim)
        self.hidden = nn.Sequential(nn.Linear(1, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.head = nn.Linear(dim, num_layers)

    def forward(self, targets: Tensor) -> Tensor:
        """See `RatioPredictor.forward`."""
        return torch.sigmoid(self.head(self.hidden(self._column(targets)))).float()


PREDICTORS: dict[str, type[RatioPredictor]] = {
    "transformer": TransformerPredictor,
    "bilstm": BiLSTMPredictor,
    "mlp": MLPPredictor,
}


def check_predictor(name: str) -> None:
    """Refuse a name that is no predictor.

    Raises:
        InvalidInputError: If it is not in `PREDICTORS`.
    """
    if name not in PREDICTORS:
        raise InvalidInputError(f"There is no predictor {name!r}; choose from {', '.join(PREDICTORS)}.")


def build_predictor(name: str, num_layers: int, *, seed: int = 0, **sizes: int) -> RatioPredictor:
    """Make the predictor `name` of `PREDICTORS`; weights come from `seed`, the global random state stays as it was.

    Args:
        name: "transformer", "bilstm" or "mlp".
        num_layers: L, decoder layers of the model to prune.
        seed: Seed of the initial weights.
        **sizes: Further arguments of the class, e.g. `dim`.

    Raises:
        InvalidInputError: If `name` is unknown or a size is not possible.
    """
    check_predictor(name)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs' generators too.
        torch.default_generator.manual_seed(seed)
        return PREDICTORS[name](num_layers, **sizes)


def train_predictor(
    predictor: RatioPredictor,
    targets: Tensor | Floats,
    ratios: Tensor | Floats,
    *,
    epochs: int = 64,
    batch_size: int = 40,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Fit a predictor to searched plans: Adam on the mean squared error of the ratios.

    Args:
        predictor: What to train, in place.
        targets: Target ratios `[N]` in [0, 1].
        ratios: Layer ratios found for them `[N, L]` in [0, 1].
        epochs: Passes over the pairs (the paper: at most 64).
        batch_size: Pairs per step.
        learning_rate: Of Adam.
        seed: Seed of the order of the pairs.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The mean loss of every epoch.

    Raises:
        InvalidInputError: If shapes differ, a value is NaN or outside [0, 1], or there is nothing to train on.

    Source: LOP (arXiv 2506.12826), Eq. 12.
    """
    place = next(predictor.parameters()).device
    targets, ratios = (torch.as_tensor(values, dtype=torch.float32, device=place) for values in (targets, ratios))
    if targets.ndim != 1 or ratios.shape != (len(targets), predictor.num_layers):
        shapes = f"targets has shape {tuple(targets.shape)} and ratios {tuple(ratios.shape)}"
        raise InvalidInputError(f"{shapes}; pass [N] and [N, {predictor.num_layers}].")
    _check_fractions("targets", targets)
    _check_fractions("ratios", ratios)
    if epochs < 1 or batch_size < 1:
        raise InvalidInputError(f"epochs is {epochs} and batch_size {batch_size}; both must be at least 1.")
    predictor.train()  # cuDNN's LSTM has no backward pass in evaluation mode; nothing else here depends on the mode.
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=learning_rate)
    losses = []
    for _ in tqdm(range(epochs), desc="predictor", unit="epoch", disable=not progress):
        total = 0.0
        for rows in torch.randperm(len(targets), generator=order).to(targets.device).split(batch_size):
            loss = F.mse_loss(predictor.teacher_forced(targets[rows], ratios[rows]), ratios[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / len(targets))
    return losses


def _check_fractions(name: str, values: Tensor) -> None:
    if not values.numel() or not bool(((values >= 0) & (values <= 1)).all()):
        raise InvalidInputError(f"{name} is empty or holds NaN or a value outside [0, 1]; pass fractions of neurons.")
