"""Elastic repositories in a folder: every size equals ordinary pruning, little is read, and nothing is believed unchecked."""

import copy
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForCausalLM

from hf_lop.errors import CheckpointMismatchError, InfeasibleBudgetError, InvalidInputError, LOPError
from hf_lop.hub.elastic import size_file
from hf_lop.hub.elastic import write as layout
from hf_lop.hub.read.files import Folder
from hf_lop.hub.read.safetensors import Place
from hf_lop.planning.budget import Budget
from hf_lop.pruner import sizes as pulling
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.pruner.sizes import pull
from tests.conftest import KINDS, drawing
from tests.fake_pruner import fake_pruner
from tests.helpers import logits
from tests.small_models import CONFIGS, text_batches
from tests.tiny_models import CONFIGS as TINY
from tests.tiny_models import TEXT_ONLY, tiny_inputs, tiny_model

RATIOS = (0.3, 0.5, 0.7)


def random_pruner(model, seed=0, sketch_rows=0):
    pruner = fake_pruner(model, seed=seed, sketch_rows=sketch_rows)
    pruner.config.base_model = "org/base"
    return pruner


@pytest.fixture(autouse=True)
def assets(tmp_path_factory, monkeypatch):
    """A cache of its own for every test."""
    folder = tmp_path_factory.mktemp("assets")
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def repositories(built, tmp_path_factory):
    """One elastic repository of every kind of FFN, and the pruner it was made with."""
    root, made = tmp_path_factory.mktemp("elastic"), {}
    for kind, model in built.items():
        made[kind] = random_pruner(model)
        with drawing() if kind == "gated" else nullcontext():
            made[kind].make_elastic(copy.deepcopy(model)).save_pretrained(root / kind)
    return root, made


@pytest.fixture
def folder(repositories, tmp_path):
    """A copy of the gated one, to be damaged."""
    return shutil.copytree(repositories[0] / "gated", tmp_path / "elastic")


def load(folder, auto=AutoModelForCausalLM, **kwargs):
    model, info = auto.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_size_it_is_the_dense_model(repositories, built, kind):
    torch.testing.assert_close(logits(load(repositories[0] / kind)), logits(built[kind]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_equals_ordinary_pruning(repositories, built, kind):
    root, pruners = repositories
    for ratio in RATIOS:
        sized = load(root / kind, lop_ratio=ratio)
        ordinary = pruners[kind].prune(copy.deepcopy(built[kind]), ratio, recover=None)
        torch.testing.assert_close(logits(sized), logits(ordinary), rtol=1e-5, atol=1e-5)
        same_order = LOPPruner.from_pretrained(root / kind).prune(load(root / kind), ratio, recover=None)
        assert same_weights(sized, same_order)
        assert torch.equal(logits(sized), logits(same_order))
        assert sized.config.pruning_config == {
            **ordinary.config.pruning_config,
            "sorted_by": pruners[kind].learned().sorted().sorted_by,
        }


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "gated" else pytest.mark.slow) for kind in CONFIGS]
)
def test_recovery_equals_that_of_ordinary_pruning(built, kind, tmp_path):
    """Within the stored columns from their products with the sketch, beyond from the whole projection."""
    pruner = random_pruner(built[kind], sketch_rows=8)
    pruner.make_elastic(copy.deepcopy(built[kind])).save_pretrained(tmp_path)
    products = [name for name in load_file(tmp_path / "elastic/model.safetensors") if name.endswith(layout.PRODUCTS)]
    assert len(products) == 4
    assert "lop_recover=None" in (tmp_path / "README.md").read_text()
    for ratio in (0.1, 0.5):
        sized = load(tmp_path, lop_ratio=ratio)
        assert sized.config.pruning_config["recovery"] == "sketch"
        ordinary = pruner.prune(copy.deepcopy(built[kind]), ratio)
        assert not torch.allclose(
            logits(ordinary), logits(load(tmp_path, lop_ratio=ratio, lop_recover=None)), atol=1e-2
        )
        torch.testing.assert_close(logits(sized), logits(ordinary), rtol=1e-4, atol=1e-4)
        same_order = LOPPruner.from_pretrained(tmp_path).prune(load(tmp_path), ratio)
        for left, right in zip(sized.parameters(), same_order.parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_recovery_in_half_precision_and_where_products_would_be_larger(built, tmp_path):
    for rows in (8, 32):
        half, folder = copy.deepcopy(built["gated"]).to(torch.bfloat16), tmp_path / str(rows)
        pruner = random_pruner(half, sketch_rows=rows)
        pruner.make_elastic(copy.deepcopy(half)).save_pretrained(folder)
        stored = load_file(folder / "elastic/model.safetensors")
        assert any(name.endswith(layout.PRODUCTS) for name in stored) == (rows == 8)
        ordinary = LOPPruner.from_pretrained(folder).prune(load(folder), 0.5)
        for left, right in zip(load(folder, lop_ratio=0.5).parameters(), ordinary.parameters(), strict=True):
            assert left.dtype is torch.bfloat16
            torch.testing.assert_close(left, right, rtol=2**-7, atol=1e-6)  # a last digit may be rounded otherwise


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in TINY])
def test_families_with_images_other_names_and_tied_embeddings(name, tmp_path):
    model, batch = tiny_model(name), tiny_inputs(name)
    pruner = random_pruner(model)
    pruner.make_elastic(copy.deepcopy(model)).save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if name in TEXT_ONLY else AutoModelForImageTextToText
    torch.testing.assert_close(logits(load(tmp_path, auto), batch), logits(model, batch), rtol=1e-4, atol=1e-4)
    sized = load(tmp_path, auto, lop_ratio=0.5)
    ordinary = pruner.prune(model, 0.5, recover=None)
    torch.testing.assert_close(logits(sized, batch), logits(ordinary, batch), rtol=1e-4, atol=1e-4)
    sized.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", auto), batch), logits(sized, batch))


def test_sharded(built, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARD", 5_000)
    pruner = random_pruner(built["gated"])
    pruner.make_elastic(copy.deepcopy(built["gated"])).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "elastic").glob("model-*-of-*.safetensors"))) == 4  # of 36 rows of 32 numbers
    ordinary = pruner.prune(copy.deepcopy(built["gated"]), 0.5, recover=None)
    sized = load(tmp_path, lop_ratio=0.5)
    torch.testing.assert_close(logits(sized), logits(ordinary), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_a_size_weighs_is_read(repositories, kind, monkeypatch):
    read, original = {}, Folder.read_into

    def counting(self, file, start, buffer):
        read[file] = read.get(file, 0) + len(buffer)
        original(self, file, start, buffer)

    monkeypatch.setattr(Folder, "read_into", counting)
    root, pruners = repositories
    ratio = 0.5
    widths = pruners[kind].plan(ratio).widths
    assert max(widths) <= 36  # all within the transposed share
    sized = load(root / kind, lop_ratio=ratio)
    weight = sum(p.numel() * p.element_size() for p in sized.parameters())
    with open(root / kind / "model.safetensors", "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    with open(root / kind / "elastic/model.safetensors", "rb") as file:
        header += int.from_bytes(file.read(8), "little")
    rows = sum(4 * width for width in widths)  # one row of each transposed tensor is compared
    assert weight <= sum(read.values()) <= weight + header + 16 + rows


def test_a_wide_layer_is_read_whole(repositories, built):
    root, pruners = repositories
    sized = load(root / "gated", lop_ratio=0.1)
    assert max(sized.config.intermediate_size) > 36
    ordinary = pruners["gated"].prune(copy.deepcopy(built["gated"]), 0.1, recover=None)
    torch.testing.assert_close(logits(sized), logits(ordinary), rtol=1e-5, atol=1e-5)


def test_other_budgets_classes_and_settings(repositories, assets):
    root, pruners = repositories
    folder, expected = root / "gated", logits(load(root / "gated", lop_ratio=0.5))
    plan = pruners["gated"].plan(0.5)
    for budget in ({"lop_params": plan.parameters}, {"lop_memory": plan.memory_after}, {"lop_flops": plan.flops}):
        assert torch.equal(logits(load(folder, **budget)), expected)
    assert all(width % 8 == 0 for width in load(folder, lop_ratio=0.5, lop_round_to=8).config.intermediate_size)
    assert torch.equal(logits(load(folder, LlamaForCausalLM, lop_ratio=0.5)), expected)
    assert torch.equal(logits(load(folder, lop_ratio=0.5, device_map="auto")), expected)
    assert load(folder, lop_ratio=0.5, dtype=torch.bfloat16).dtype is torch.bfloat16
    loud = load(folder, lop_ratio=0.5, output_attentions=True, attn_implementation="eager")
    assert loud.config.output_attentions is True
    assert len(loud(**text_batches(1)[0]).attentions) == 4
    named = LlamaForCausalLM.from_pretrained(pretrained_model_name_or_path=folder, lop_ratio=0.5, lop_recover=None)
    assert torch.equal(logits(named), expected)
    body, info = AutoModel.from_pretrained(folder, lop_ratio=0.5, output_loading_info=True)
    assert not info["missing_keys"]
    assert tuple(body.config.intermediate_size) == plan.widths
    assert [p for p in assets.rglob("*") if p.is_file()] == []  # nothing of a folder stays


def test_weights_on_disk_stay_as_long_as_the_model(repositories, assets, tmp_path):
    parts = (
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(4)),
    )
    where = dict.fromkeys(parts, "cpu") | {"model.layers.3": "disk"}
    model = load(repositories[0] / "gated", lop_ratio=0.5, device_map=where, offload_folder=tmp_path)
    torch.testing.assert_close(logits(model), logits(load(repositories[0] / "gated", lop_ratio=0.5)))
    assert [path.name for path in assets.rglob("*.safetensors")] == ["model.safetensors"]


def test_a_size_saves_as_a_pruned_model(repositories, tmp_path):
    sized = load(repositories[0] / "gated", lop_ratio=0.5)
    assert sized.name_or_path == str(repositories[0] / "gated")
    sized.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_lop.py").is_file()
    assert not (tmp_path / "elastic").exists()
    assert torch.equal(logits(load(tmp_path)), logits(sized))


class TestSaving:
    def test_files(self, repositories, folder):
        config = json.loads((folder / "config.json").read_text())
        assert config["intermediate_size"] == 48
        assert "auto_map" not in config
        assert config["elastic_config"]["base_model"] == "org/base"
        assert {path.name for path in folder.iterdir() if path.suffix == ".safetensors"} == {"model.safetensors"}
        extra = load_file(folder / "elastic/model.safetensors")
        dense = load_file(folder / "model.safetensors")
        assert [name.split(".")[-2] for name in extra] == ["down_proj"] * 4
        for name, tensor in extra.items():
            assert tensor.shape == (36, 32)
            assert torch.equal(tensor.T, dense[name][:, :36])
        card = (folder / "README.md").read_text()
        assert "lop_ratio=0.3" in card
        assert "org/base" in card
        assert "Nothing takes over" in card
        assert (folder / "assets/plans.png").stat().st_size > 1000

    def test_again_in_the_same_folder(self, built, folder):
        (folder / "elastic/model-00001-of-00002.safetensors").write_bytes(b"old")
        (folder / "elastic/notes.txt").write_text("mine")
        pruner = random_pruner(built["gated"], seed=1)
        pruner.make_elastic(copy.deepcopy(built["gated"])).save_pretrained(folder)
        assert sorted(path.name for path in (folder / "elastic").iterdir()) == ["model.safetensors", "notes.txt"]
        ordinary = pruner.prune(copy.deepcopy(built["gated"]), 0.5, recover=None)
        torch.testing.assert_close(logits(load(folder, lop_ratio=0.5)), logits(ordinary), rtol=1e-5, atol=1e-5)

    def test_without_its_pruner_it_saves_as_a_dense_model(self, folder, tmp_path):
        model = load(folder)
        model.save_pretrained(tmp_path / "dense")
        assert "elastic_config" not in json.loads((tmp_path / "dense/config.json").read_text())
        assert not (tmp_path / "dense/elastic").exists()
        assert model.config.elastic_config["base_model"] == "org/base"
        with pytest.raises(CheckpointMismatchError, match="no elastic repository"):
            load(tmp_path / "dense", lop_ratio=0.5)

    @pytest.mark.slow
    def test_the_memory_budget_counts_the_stored_dtype(self, built, tmp_path):
        half = copy.deepcopy(built["gated"]).to(torch.bfloat16)
        random_pruner(built["gated"]).make_elastic(half).save_pretrained(tmp_path)
        budget = 60_000  # bytes; in float32 no size is as small
        sized = load(tmp_path, lop_memory=budget)
        assert budget - 200 < sum(p.numel() * p.element_size() for p in sized.parameters()) <= budget


class TestPairs:
    """Which pruner goes with which model."""

    def test_the_pruner_in_the_repository(self, repositories):
        root, pruners = repositories
        pruner = LOPPruner.from_pretrained(root / "gated")
        assert pruner.plan(0.4).widths == pruners["gated"].plan(0.4).widths
        assert [order.tolist() for order in pruner.order()] == [list(range(48))] * 4
        index = pruners["gated"].order()[1]
        assert torch.equal(pruner.statistics()[1].square, pruners["gated"].statistics()[1].square[index])

    def test_the_pruner_it_was_made_with_knows_its_order(self, repositories, built):
        root, pruners = repositories
        ordinary = pruners["gated"].prune(copy.deepcopy(built["gated"]), 0.5, recover=None)
        ours = pruners["gated"].prune(load(root / "gated"), 0.5, recover=None)
        torch.testing.assert_close(logits(ours), logits(ordinary), rtol=1e-5, atol=1e-5)
        assert "elastic_config" not in vars(ours.config)

    def test_it_prunes_from_file_to_file_too(self, repositories, tmp_path):
        folder = repositories[0] / "gated"
        LOPPruner.from_pretrained(folder).prune(folder, 0.5, recover=None, output_dir=tmp_path / "half")
        assert same_weights(load(tmp_path / "half"), load(folder, lop_ratio=0.5))
        assert "elastic_config" not in json.loads((tmp_path / "half/config.json").read_text())

    def test_others_are_refused(self, repositories, built):
        root, _ = repositories
        with pytest.raises(CheckpointMismatchError, match="sorted, by another order"):
            random_pruner(built["gated"], seed=5).prune(load(root / "gated"), 0.5)
        with pytest.raises(CheckpointMismatchError, match="belongs to the sorted neurons"):
            LOPPruner.from_pretrained(root / "gated").prune(copy.deepcopy(built["gated"]), 0.5)
        with pytest.raises(CheckpointMismatchError, match="elastic already"):
            LOPPruner.from_pretrained(root / "gated").make_elastic(load(root / "gated"))
        with pytest.raises(CheckpointMismatchError, match="belongs to the sorted neurons"):
            LOPPruner.from_pretrained(root / "gated").make_elastic(copy.deepcopy(built["gated"]))

    def test_a_refused_model_is_unchanged(self, built):
        model = copy.deepcopy(built["gated"])
        with pytest.raises(CheckpointMismatchError, match="model type"):
            random_pruner(built["fused"]).make_elastic(model)
        assert same_weights(model, built["gated"])


def test_pull_into_the_current_folder_or_a_full_one(repositories, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pull(repositories[0] / "gated", ".", Budget.of(0.5))
    assert same_weights(load(tmp_path / "here"), load(repositories[0] / "gated", lop_ratio=0.5))
    monkeypatch.setattr("hf_lop.pruner.sizes._find", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(InvalidInputError, match="not empty"):
        pull(repositories[0] / "gated", tmp_path / "here", Budget.of(0.5))


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"lop_size": 3}, InvalidInputError, "lop_size is no size"),
            ({"lop_ratio": 0.3, "lop_params": 1e4}, InfeasibleBudgetError, "params: A budget of 10000 is below"),
            ({"lop_round_to": 8}, InvalidInputError, "No budget was given"),
            ({"lop_ratio": 1.5}, InvalidInputError, "ratio is 1.5"),
            ({"lop_ratio": 0.3, "subfolder": "x"}, InvalidInputError, "subfolder"),
            ({"lop_ratio": 0.3, "lop_recover": "sketch"}, InvalidInputError, "no sketch"),
            ({"lop_ratio": 0.3, "lop_recover": "fold"}, InvalidInputError, "without the weights it does not have"),
            ({"lop_params": 10}, InfeasibleBudgetError, "smallest possible"),
        ],
    )
    def test_arguments(self, repositories, arguments, error, words):
        with pytest.raises(error, match=words):
            LlamaForCausalLM.from_pretrained(repositories[0] / "gated", **arguments)

    def test_not_elastic(self, built, tmp_path):
        built["gated"].save_pretrained(tmp_path)
        with pytest.raises(CheckpointMismatchError, match="no elastic repository"):
            load(tmp_path, lop_ratio=0.3)
        with pytest.raises(InvalidInputError, match="no-such"):
            LlamaForCausalLM.from_pretrained("org/no-such", lop_ratio=0.3)


class TestHostile:
    """Repositories that lie, or are damaged: an error that says so, and nothing left behind."""

    def refused(self, folder, assets, words):
        with pytest.raises(LOPError, match=words):
            load(folder, lop_ratio=0.5)
        assert [path for path in assets.rglob("*") if path.is_file()] == []

    def rewrite(self, path, change):
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    def test_no_extra_file(self, folder, assets):
        shutil.rmtree(folder / "elastic")
        self.refused(folder, assets, "its folder elastic/ has no weights")

    def test_no_pruner(self, folder, assets):
        shutil.rmtree(folder / "pruner")
        self.refused(folder, assets, "cannot be read")

    @pytest.mark.parametrize("file", ["model.safetensors", "elastic/model.safetensors", "pruner/model.safetensors"])
    def test_truncated(self, folder, assets, file):
        (folder / file).write_bytes((folder / file).read_bytes()[:-100])
        self.refused(folder, assets, "truncated")

    @pytest.mark.parametrize(
        "change",
        [
            lambda tensors, name: tensors.update({name: tensors[name][:, :-1]}),
            lambda tensors, name: tensors.update({name: tensors[name].to(torch.bfloat16)}),
            lambda tensors, name: tensors.update({name: tensors[name].flatten()}),
            lambda tensors, name: tensors.update({name + layout.PRODUCTS: torch.zeros(33, 8)}),
        ],
    )
    def test_extra_of_another_shape_or_dtype(self, folder, assets, change):
        name = "model.layers.2.mlp.down_proj.weight"
        self.rewrite(folder / "elastic/model.safetensors", lambda tensors: change(tensors, name))
        self.refused(folder, assets, "layers.2.*elastic repository is damaged")

    def test_extra_with_too_few_rows_or_a_tensor_less_is_read_around(self, folder):
        expected = logits(load(folder, lop_ratio=0.5))
        first, second = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2))

        def change(tensors):
            del tensors[first]
            tensors[second] = tensors[second][:1]

        self.rewrite(folder / "elastic/model.safetensors", change)
        assert torch.equal(logits(load(folder, lop_ratio=0.5)), expected)

    def test_weights_that_were_replaced(self, folder, assets):
        model = load(folder)
        with torch.no_grad():
            model.model.layers[3].mlp.down_proj.weight.mul_(1.01)
        mark = model.config.elastic_config
        model.save_pretrained(folder)  # hf_lop leaves the mark out; other programs would not
        config = json.loads((folder / "config.json").read_text()) | {"elastic_config": mark}
        (folder / "config.json").write_text(json.dumps(config))
        self.refused(folder, assets, "the weights were replaced")

    def test_offsets_that_lie(self, folder, assets):
        path = folder / "elastic/model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        entry = header["model.layers.0.mlp.down_proj.weight"]
        entry["data_offsets"] = [offset + 10**12 for offset in entry["data_offsets"]]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        self.refused(folder, assets, "damaged")

    def test_a_pickle(self, folder, assets):
        torch.save({"x": torch.zeros(3)}, folder / "elastic/model.safetensors")
        self.refused(folder, assets, "pickle")

    def test_pruner_of_another_base(self, folder, assets, built):
        shutil.rmtree(folder / "pruner")
        random_pruner(built["fused"]).save_pretrained(folder / "pruner")
        self.refused(folder, assets, "model type")

    def test_pruner_of_another_order(self, folder, assets, built):
        shutil.rmtree(folder / "pruner")
        random_pruner(built["gated"], seed=9).save_pretrained(folder / "pruner")
        self.refused(folder, assets, "by another order")

    def test_weights_of_another_base(self, folder, assets, repositories):
        shutil.copy(repositories[0] / "conv1d/model.safetensors", folder / "model.safetensors")
        self.refused(folder, assets, "missing")

    def test_mark_of_another_kind(self, folder, assets):
        config = json.loads((folder / "config.json").read_text())
        for mark in ("yes", [1], {"order": 3}, {}):
            (folder / "config.json").write_text(json.dumps(config | {"elastic_config": mark}))
            self.refused(folder, assets, "no elastic repository|sorted")


def test_a_job_that_nobody_waits_for_writes_to_no_other_file(tmp_path, monkeypatch):
    """As after Ctrl-C was pressed twice: the file is closed, and its number is that of the next one that is opened."""
    goes_on, started, going_on = threading.Event(), threading.Event(), []

    class Slow:
        def read_into(self, file, start, buffer):
            started.set()
            goes_on.wait()
            buffer[:] = b"W" * len(buffer)

    class Interrupted(ThreadPoolExecutor):
        def map(self, run, jobs):
            going_on.append(self.submit(run, *jobs))
            started.wait()
            raise KeyboardInterrupt

        def shutdown(self, **_):
            raise KeyboardInterrupt

    monkeypatch.setattr(size_file, "ThreadPoolExecutor", Interrupted)
    main = SimpleNamespace(files=Slow(), places={"x": Place("file", "U8", (200,), 0, 200)})
    with pytest.raises(KeyboardInterrupt):
        size_file.write_size(main, SimpleNamespace(places={}), {}, [], tmp_path / "size", solvers=None, remote=True)
    with open(tmp_path / "mine", "wb") as mine:
        mine.write(b"my own")
        mine.flush()
        goes_on.set()
        going_on[0].result()
    assert (tmp_path / "mine").read_bytes() == b"my own"


def test_killed_while_a_size_is_made_anew(tmp_path, monkeypatch):
    def assemble(source, folder):
        (folder / "config.json").touch()
        (folder / "generation_config.json").touch()

    def killed(folder, **_):
        if folder.exists():
            (folder / "generation_config.json").unlink()
            raise KeyboardInterrupt

    def files(**hub):
        source = SimpleNamespace(name="me/elastic", commit="c", hub=hub, key=lambda: "size")
        with pulling._size_folder(source, in_memory=False) as (folder, _):
            return sorted(path.name for path in folder.iterdir())

    monkeypatch.setattr(pulling, "_assemble", assemble)
    whole = files()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            files(force_download=True)
    assert files() == whole
