"""The sketch of second moments: how it is made, stored and used, against exact second moments."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.learning.sketch import Sketch, Sketcher, _rotation
from hf_lop.learning.statistics import collect_statistics
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.recovery.by_layer import recover_lstsq, recover_sketch
from hf_lop.recovery.moments import second_moments
from hf_lop.units.slice import output_weight, prunable_units
from tests.recovery.test_recovery import activations, some_kept
from tests.small_models import CONFIGS, text_batches


def sketched(model, batches, rows, seed=0):
    """Statistics and directions from one pass."""
    units = prunable_units(model)
    sketcher = Sketcher([unit.count for unit in units], rows, seed=seed)
    statistics = collect_statistics(model, batches, units, also=sketcher.add)
    return statistics, sketcher.result(statistics)


def squares(statistics):
    return [measured.square for measured in statistics]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_sketch_of_full_rank_is_least_squares(built, kind):
    model, batches = built[kind], text_batches(12, padded=True)
    units = prunable_units(model)
    kept = some_kept(units)
    statistics, directions = sketched(model, batches, 48)
    samples = sum(len(batch["input_ids"]) for batch in batches)
    grams = [gram / samples for gram in second_moments(model, batches, units)]
    for found, gram, measured in zip(directions, grams, statistics, strict=True):
        torch.testing.assert_close(found.T @ found, gram, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.square().sum(0), measured.square, rtol=1e-3, atol=1e-5)
    expected = recover_lstsq(model, units, kept, grams, damping=0.1)
    weights = recover_sketch(model, units, kept, directions, squares(statistics), damping=0.1)
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_formula_is_least_squares_on_what_the_sketch_says(llama):
    """Solved through r equations, but the same as the k equations of the moments that the sketch stands for."""
    units = prunable_units(llama)
    kept = some_kept(units)
    statistics, directions = sketched(llama, text_batches(12), 8)
    grams = [
        b.T @ b + torch.diag((s - b.square().sum(0)).clamp_min(0))
        for b, s in zip(directions, squares(statistics), strict=True)
    ]
    expected = recover_lstsq(llama, units, kept, grams, damping=0.2)
    weights = recover_sketch(llama, units, kept, directions, squares(statistics), damping=0.2)
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gated", "plain_bias", "conv1d", "fused"])
def test_held_out_outputs_come_closer(built, kind):
    """Stored and read again, with more and more directions, every layer by itself, on other tokens."""
    model, report = built[kind], text_batches(40, seed=9)
    units = prunable_units(model)
    kept = some_kept(units, 24)
    errors = []
    inputs = activations(model, report)[0]
    for rows in (0, 4, 16, 48):
        statistics, directions = sketched(model, text_batches(200), rows or 2)
        stored = [Sketch.of(part).directions() for part in directions]
        weights = recover_sketch(model, units, kept, stored, squares(statistics))
        error = 0.0
        for layer, x in enumerate(inputs):
            dense, indices = output_weight(model, units[layer]).double(), kept[layer].sort().values
            cut = weights[layer].double() if rows else dense[:, indices]
            error += float((x @ dense.T - x[:, indices] @ cut.T).square().mean())
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("rows", [4, 8])
def test_few_test_vectors_find_what_there_is(rows):
    """Activations of rank 4 in 200 dimensions, of very different sizes: one pass with 16 or 32 test vectors has it all."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 2, 200)
    x = torch.randn(50, 10, 4, generator=generator) @ torch.randn(4, 200, generator=generator) * sizes
    sketcher = Sketcher([200], rows)
    mask = torch.ones(50, 10, dtype=torch.bool)
    mask[::2, 6:] = False
    sketcher.add(0, x, mask)
    gram = x[mask].T.double() @ x[mask].double() / 50

    class Measured:
        square = gram.diagonal()

    found = sketcher.result([Measured])[0].double()
    unit = gram.diagonal().sqrt()
    torch.testing.assert_close((found.T @ found / unit).T / unit, (gram / unit).T / unit, rtol=0, atol=2e-2)
    assert found.shape == (rows, 200)


@pytest.mark.parametrize("rows", [2, 8, 48])
def test_batches_do_not_matter(built, rows):
    model = built["gated"]
    ids = torch.cat([batch["input_ids"] for batch in text_batches(12)])
    found = [
        sketched(
            model, [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)], rows
        )
        for size in (1, 5, 24)
    ]
    for _, other in found[1:]:
        for a, b in zip(found[0][1], other, strict=True):
            torch.testing.assert_close(a.T @ a, b.T @ b, rtol=1e-3, atol=1e-4)


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 100), st.floats(-20, 20))
def test_four_bits_keep_the_products(half, width, seed, size):
    """Every number is read within half a step, or as the last one where it lies beyond; no zero is made nonzero.

    The bounds of the products hold for all values that can be drawn here: the worst is a neuron of 16 numbers, one of
    which is cut off at 2.7 sigma (0.382), and a layer of 24 rows and two neurons (0.0604 on average).
    """
    rows = 8 * half
    directions = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 10.0**size
    directions[:, 0] = 0
    stored = Sketch.of(directions)
    assert (stored.codes.shape, stored.codes.dtype) == ((width, rows // 2), torch.uint8)
    again = stored.directions()
    assert again.shape == (rows, width)
    assert not again[:, 0].any()
    steps = (_rotation(rows).T @ directions.double())[:, 1:] / stored.scale[1:].double()
    read = again[:, 1:].double() / stored.scale[1:].double()
    torch.testing.assert_close(read, steps.clamp(-7.5, 7.5), rtol=0, atol=0.5 + 1e-5)
    unit = directions.double().square().sum(0).sqrt().clamp_min(1e-300)
    off = (again.double().T @ again.double() - directions.double().T @ directions.double()) / unit / unit[:, None]
    assert off.abs().max() < 0.4
    assert float(off.abs().mean()) < 0.061


def test_the_seed_decides_and_nothing_global(built):
    batches = text_batches(4)
    state = torch.get_rng_state()
    first, again, other = (sketched(built["gated"], batches, 4, seed)[1][1] for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_silent_neurons_and_layers(llama):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight.zero_()
        llama.model.layers[2].mlp.up_proj.weight[:20] = 0
    units = prunable_units(llama)
    kept = some_kept(units)
    statistics, directions = sketched(llama, text_batches(4), 8)
    stored = [Sketch.of(part).directions() for part in directions]
    weights = recover_sketch(llama, units, kept, stored, squares(statistics))
    assert all(torch.isfinite(weight).all() for weight in weights)
    assert torch.equal(weights[1], output_weight(llama, units[1])[:, kept[1].sort().values])


def test_what_does_not_fit_is_refused(llama):
    units = prunable_units(llama)
    kept = some_kept(units)
    statistics, directions = sketched(llama, text_batches(1), 4)
    with pytest.raises(InvalidInputError, match="damping"):
        recover_sketch(llama, units, kept, directions, squares(statistics), damping=0)
    for wrong in (directions[:3], [part[:, :40] for part in directions]):
        with pytest.raises(InvalidInputError, match="another model"):
            recover_sketch(llama, units, kept, wrong, squares(statistics))
    with pytest.raises(InvalidInputError, match="damaged"):
        recover_sketch(llama, units, kept, [torch.full((4, 48), torch.nan)] * 4, squares(statistics))
    for rows in (-2, 3, 4.0, True):
        with pytest.raises(InvalidInputError, match="even number"):
            Sketcher([48], rows)


@pytest.fixture(scope="module")
def pruner(built):
    """Fitted on more data than that of other tests, of which no sketch can be made."""
    return LOPPruner.fit(built["gated"], text_batches(20), text_batches(1, seed=1), predictor="mlp")


class TestPruner:
    @pytest.fixture
    def folder(self, pruner, tmp_path):
        pruner.save_pretrained(tmp_path / "pruner")
        return tmp_path / "pruner"

    def test_no_more_directions_than_neurons(self, pruner):
        assert pruner.config.sketch_rows == 48
        assert pruner.sketch.shape == (192 * 24,)
        assert [part.shape for part in pruner.directions()] == [(48, 48)] * 4

    def test_saved_and_loaded(self, pruner, folder, built):
        loaded, info = LOPPruner.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert loaded.sketch.dtype is torch.uint8
        models = [p.prune(copy.deepcopy(built["gated"]), 0.5, recover="sketch") for p in (pruner, loaded)]
        states = [model.state_dict() for model in models]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        half = LOPPruner.from_pretrained(folder, dtype=torch.bfloat16)
        assert half.sketch.dtype is torch.uint8
        half.prune(copy.deepcopy(built["gated"]), 0.5, recover="sketch")

    def test_a_repository_without_sketch_loads_and_prunes(self, folder, tmp_path, built):
        config = json.loads((folder / "config.json").read_text())
        del config["sketch_rows"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("sketch")}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        old, info = LOPPruner.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert old.directions() == []
        pruned = old.prune(copy.deepcopy(built["gated"]), 0.5)
        assert pruned.config.pruning_config["recovery"] is None
        with pytest.raises(InvalidInputError, match="no sketch"):
            old.prune(copy.deepcopy(built["gated"]), 0.5, recover="sketch")

    @pytest.mark.parametrize(("rows", "words"), [(46, "mismatched"), (3, "even number"), (-2, "even number")])
    def test_a_tampered_size_is_refused(self, folder, tmp_path, rows, words):
        config = json.loads((folder / "config.json").read_text())
        config["sketch_rows"] = rows
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((CheckpointMismatchError, InvalidInputError), match=words):
            LOPPruner.from_pretrained(tmp_path)

    @pytest.mark.slow
    def test_none_and_bad_sizes(self, built):
        bare = LOPPruner.fit(built["gated"], text_batches(2), text_batches(1, seed=1), sketch_rows=0, predictor="mlp")
        assert (bare.config.sketch_rows, bare.directions()) == (0, [])
        assert "sketch" not in bare.state_dict()
        with pytest.warns(UserWarning, match="40 tokens for layers of up to 48 neurons"):
            few = LOPPruner.fit(built["gated"], text_batches(2), text_batches(1, seed=1), predictor="mlp")
        assert (few.config.sketch_rows, few.directions()) == (0, [])
        with pytest.raises(InvalidInputError, match="even number"):
            LOPPruner.fit(built["gated"], text_batches(2), text_batches(1, seed=1), sketch_rows=5, predictor="mlp")
