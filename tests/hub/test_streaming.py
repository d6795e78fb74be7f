"""From file to file: the same bytes as in memory, whatever the model, the layout or the kill; and little memory."""

import json
import random
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_bytes
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_lop import demo
from hf_lop.cli import app
from hf_lop.errors import CheckpointMismatchError, InfeasibleBudgetError, InvalidInputError, UnsupportedModelError
from hf_lop.hub.read.safetensors import Place
from hf_lop.hub.write.staging import Staging
from hf_lop.hub.write.tensors import Cutter, SavedTensor, layout
from tests import warm
from tests.fake_pruner import fake_pruner
from tests.hub_server import File, Repository, run_python, serve
from tests.small_models import build
from tests.tiny_models import CONFIGS, tiny_model

DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float64]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differences(first, second):
    a, b = contents(first), contents(second)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def both(pruner, base, folder, *budget, shard="50GB", **options):
    """Prune in memory and from file to file, into folders of the same name; return what differs."""
    memory, files = folder / "memory" / "pruned", folder / "files" / "pruned"
    pruner.prune(base, *budget, **options).save_pretrained(memory)
    pruner.prune(base, *budget, **options, output_dir=files)
    assert [path.name for path in files.parent.iterdir()] == ["pruned"]
    return differences(memory, files)


@pytest.fixture(scope="module")
def demo_pruner():
    return demo.load_pruner()


@pytest.fixture
def base(llama, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="module")
def fake():
    return fake_pruner(build("gated"))


# -- The same bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        ((0.3,), {}),
        ((0.0,), {"recover": "sketch"}),
        pytest.param((0.5,), {"recover": "fold", "round_to": 8}, marks=pytest.mark.slow),
        pytest.param((0.7,), {"recover": None, "method": "magnitude"}, marks=pytest.mark.slow),
        ((), {"params": 600_000, "recover": "sketch", "method": "flap"}),
    ],
)
def test_the_demo(demo_pruner, tmp_path, budget, options):
    assert both(demo_pruner, demo.MODEL_DIR, tmp_path, *budget, **options) == []
    made = json.loads((tmp_path / "files" / "pruned" / "config.json").read_text())["pruning_config"]
    assert (made["ratio"] > 0) or made["recovery"] is None  # nothing was removed


@pytest.mark.slow
@pytest.mark.parametrize("recover", ["sketch", "fold", None])
@pytest.mark.parametrize("kind", ["gated", "gated_bias", "fused", "plain_bias", "conv1d"])
def test_kinds_of_ffns(built, tmp_path, kind, recover):
    model = built[kind]
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    assert both(fake_pruner(model), tmp_path / "base", tmp_path, 0.4, method="mcts", recover=recover) == []


@pytest.mark.parametrize(
    "name",
    [name if name in ("qwen2_5_vl", "qwen2") else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS],
)
def test_families_whose_weights_are_renamed_or_tied(tmp_path, name):
    model = tiny_model(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    assert both(fake_pruner(model), tmp_path / "base", tmp_path, 0.4, method="mcts", recover="sketch") == []


def test_weights_stored_in_another_dtype_than_the_config_names(fake, base, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert both(fake, base, tmp_path, 0.4, method="mcts", recover="fold") == []
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config))
    assert both(fake, base, tmp_path / "auto", 0.4, method="mcts", recover="sketch") == []


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_stored_twice(tmp_path, equal):
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    assert both(fake_pruner(model), tmp_path / "base", tmp_path, 0.4, method="mcts", recover=None) == []
    assert ("lm_head.weight" in load_file(tmp_path / "files" / "pruned" / "model.safetensors")) != equal


def test_unused_tensors_are_left_out_as_in_memory(fake, base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    save_file(
        {**tensors, "model.layers.0.rotary_emb.inv_freq": torch.ones(4)}, base / "model.safetensors", {"format": "pt"}
    )
    assert both(fake, base, tmp_path, 0.4, method="mcts", recover=None) == []


def test_sharded_output(fake, base, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lop.hub.write.stream.write_pruned.__kwdefaults__", {"max_shard_size": "40KB"})
    fake.prune(base, 0.4, method="mcts").save_pretrained(tmp_path / "memory" / "out", max_shard_size="40KB")
    fake.prune(base, 0.4, method="mcts", output_dir=tmp_path / "files" / "out")
    assert differences(tmp_path / "memory" / "out", tmp_path / "files" / "out") == []
    assert len(list((tmp_path / "files" / "out").glob("model-*.safetensors"))) > 1


@given(st.data())
def test_headers_are_those_of_safetensors(data):
    names = data.draw(
        st.lists(st.text(min_size=1, max_size=5).filter(lambda t: t != "__metadata__"), min_size=1, unique=True)
    )
    tensors = {}
    for name in names:
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        tensors[name] = torch.zeros(shape, dtype=data.draw(st.sampled_from(DTYPES)))
    header, order = layout([SavedTensor(n, tuple(t.shape), t.dtype, n) for n, t in tensors.items()], {"format": "pt"})
    expected = save_bytes(tensors, {"format": "pt"})
    assert expected[: len(header)] == header
    assert len(expected) == len(header) + sum(output.num_bytes for output in order)


@given(st.data())
def test_cutting_in_blocks_is_indexing(data):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dtype, other = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    tensor = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    axis = data.draw(st.integers(0, len(shape) - 1))
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, shape[axis] - 1), min_size=1))))
    expected = tensor.index_select(axis, kept).to(other)
    cut, copied = (
        SavedTensor("y", tuple(expected.shape), other, "x", axis, kept),
        SavedTensor("z", tuple(shape), dtype, "x"),
    )
    with Cutter(_Memory({"x": tensor}), [cut, copied], block=data.draw(st.integers(8, 64))) as cutter:
        assert b"".join(map(bytes, cutter.parts(cut))) == expected.view(-1).view(torch.uint8).numpy().tobytes()
        whole = b"".join(map(bytes, cutter.parts(copied)))
    assert whole == tensor.view(-1).view(torch.uint8).numpy().tobytes()


def test_a_tensor_of_one_row_is_copied_in_blocks():
    tensor = torch.arange(1000).view(1, 1000)
    output = SavedTensor("y", (1, 1000), tensor.dtype, "x")
    with Cutter(_Memory({"x": tensor}), [output], block=64) as cutter:
        parts = [bytes(part) for part in cutter.parts(output)]
    assert {len(part) for part in parts} == {64}
    assert b"".join(parts) == tensor.numpy().tobytes()


class _Memory:
    """Tensors in memory, in place of files."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.places = {n: Place("", "", tuple(t.shape), 0, t.numel() * t.itemsize) for n, t in tensors.items()}
        self.bytes = {n: t.view(-1).view(torch.uint8).numpy() for n, t in tensors.items()}

    def rows(self, name, start=0, stop=None):
        return self.tensors[name][start:stop]

    def read_into(self, place, start, buffer):
        raw = next(self.bytes[name] for name, own in self.places.items() if own is place)
        np.frombuffer(buffer, np.uint8)[:] = raw[start : start + len(buffer)]


# -- Whole or not at all -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_fails_leaves_nothing_and_the_next_goes_on(fake, base, tmp_path, monkeypatch):
    expected, out = tmp_path / "memory" / "out", tmp_path / "out"
    fake.prune(base, 0.4, method="mcts").save_pretrained(expected)
    monkeypatch.setattr("hf_lop.hub.write.staging.LOT", 1)
    parts, made = Cutter.parts, []

    def failing(self, output):
        made.append(output.name)
        if len(made) == 12:
            raise OSError("disk full")
        return parts(self, output)

    monkeypatch.setattr(Cutter, "parts", failing)
    with pytest.raises(OSError, match="disk full"):
        fake.prune(base, 0.4, method="mcts", output_dir=out)
    assert not out.exists()
    assert not list(tmp_path.rglob(".out.partial/out/*.safetensors"))  # nothing that a loader would take
    fake.prune(base, 0.4, method="mcts", output_dir=out)
    assert differences(expected, out) == []
    assert len(made) == len(load_file(out / "model.safetensors")) + 1  # no tensor was made twice
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.slow
def test_another_call_starts_anew(fake, base, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lop.hub.write.staging.LOT", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fake.prune(base, 0.4, method="mcts", recover="fold", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fake.prune(base, 0.4, method="mcts", recover="sketch", output_dir=tmp_path / "out")
    fake.prune(base, 0.4, method="mcts", recover="sketch").save_pretrained(tmp_path / "memory" / "out")
    assert differences(tmp_path / "memory" / "out", tmp_path / "out") == []


def test_a_changed_input_starts_anew(fake, base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fake.prune(base, 0.4, method="mcts", output_dir=tmp_path / "out")
    tensors = {name: tensor + 1 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    fake.prune(base, 0.4, method="mcts", output_dir=tmp_path / "out")
    fake.prune(base, 0.4, method="mcts").save_pretrained(tmp_path / "memory" / "out")
    assert differences(tmp_path / "memory" / "out", tmp_path / "out") == []


def test_what_lies_beside_the_weights_starts_anew_as_well(fake, base, tmp_path, monkeypatch):
    (base / "tokenizer_config.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fake.prune(base, 0.4, method="mcts", output_dir=tmp_path / "out")
    (base / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    fake.prune(base, 0.4, method="mcts", output_dir=tmp_path / "out")
    fake.prune(base, 0.4, method="mcts").save_pretrained(tmp_path / "memory" / "out")
    assert differences(tmp_path / "memory" / "out", tmp_path / "out") == []


def test_an_input_that_changes_meanwhile_is_refused_even_if_it_changes_back(fake, base, tmp_path, monkeypatch):
    kept = shutil.copytree(base, tmp_path / "kept")
    parts, made = Cutter.parts, []

    def changing(self, output):
        made.append(output.name)
        if len(made) == 12:
            tensors = {name: tensor + 1 for name, tensor in load_file(kept / "model.safetensors").items()}
            (base / "model.safetensors").write_bytes(save_bytes(tensors, {"format": "pt"}))
        return parts(self, output)

    with monkeypatch.context() as patch:
        patch.setattr(Cutter, "parts", changing)
        with pytest.raises(CheckpointMismatchError, match="changed while it was read"):
            fake.prune(base, 0.4, method="mcts", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.copy2(kept / "model.safetensors", base / "model.safetensors")  # with its old time
    fake.prune(base, 0.4, method="mcts", output_dir=tmp_path / "out")
    fake.prune(base, 0.4, method="mcts").save_pretrained(tmp_path / "memory" / "out")
    assert differences(tmp_path / "memory" / "out", tmp_path / "out") == []


KILLED = """
import hf_lop.hub.write.staging as staging
staging.LOT = 1
from hf_lop.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("plots")  # the killed process draws them
def test_killed_at_any_moment(demo_pruner, tmp_path, seed):
    demo_pruner.save_pretrained(tmp_path / "pruner")
    demo_pruner.prune(demo.MODEL_DIR, 0.3).save_pretrained(tmp_path / "memory" / "out")
    out, chance = tmp_path / "out", random.Random(seed)
    arguments = [
        "prune",
        str(demo.MODEL_DIR),
        "--pruner",
        str(tmp_path / "pruner"),
        "--out",
        str(out),
        "--ratio",
        "0.3",
    ]
    start, killed = time.monotonic(), 0
    while True:
        process = warm.start(KILLED, *arguments, "--stream")
        if killed < 6:
            partial = tmp_path / ".out.partial"
            while process.exitcode is None and not partial.exists():
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        killed += 1
        assert not out.exists() or differences(tmp_path / "memory" / "out", out) == []
        if out.exists():  # killed behind the end: the folder is there, whole
            return
        assert time.monotonic() - start < 250
    assert killed
    assert differences(tmp_path / "memory" / "out", out) == []


# -- Refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 1.5}, InvalidInputError, "ratio"),
        ({"ratio": 0.999}, InfeasibleBudgetError, "ratio"),
        ({"ratio": 0.3, "recover": "lstsq"}, InvalidInputError, "needs data"),
        ({"ratio": 0.3, "recover": "bias"}, InvalidInputError, "moved to the comparison"),
        ({"ratio": 0.3, "data": []}, InvalidInputError, "neither data nor loading"),
    ],
)
def test_bad_arguments(fake, base, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        fake.prune(base, **options, method="mcts", output_dir=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_model_in_memory_or_a_full_folder(fake, base, llama, tmp_path):
    with pytest.raises(InvalidInputError, match="Hub id or a folder"):
        fake.prune(llama, 0.3, method="mcts", output_dir=tmp_path / "out")
    with pytest.raises(InvalidInputError, match="is not empty"):
        fake.prune(base, 0.3, method="mcts", output_dir=base)


def test_a_full_disk_is_noticed_first(fake, base, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(InvalidInputError, match="has room for 5 bytes"):
        fake.prune(base, 0.3, method="mcts", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _pickled(base):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def _truncated(base):
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-1])


def _incomplete(base):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def _other_shape(base):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def _config(**changes):
    def change(base):
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | changes))

    return change


def _generation_config(base):
    (base / "generation_config.json").write_text("[]")


HOSTILE = {
    "pickle": (_pickled, CheckpointMismatchError, "pickle"),
    "truncated": (_truncated, CheckpointMismatchError, "truncated"),
    "incomplete": (_incomplete, CheckpointMismatchError, "1 weights are missing"),
    "other shape": (_other_shape, CheckpointMismatchError, "mismatched"),
    "deep": (_config(num_hidden_layers=10**9), CheckpointMismatchError, "1,000,000,000 layers"),
    "long list": (_config(intermediate_size=[1] * 5000), CheckpointMismatchError, "5,000 layers"),
    "sparse list": (
        _config(num_hidden_layers=10**9, per_layer_config={"0": {"intermediate_size": 3}}),
        CheckpointMismatchError,
        "1,000,000,000 layers",
    ),
    "large": (_config(padding="x" * 20_000_000), CheckpointMismatchError, "at most 20,000,000"),
    "typeless": (_config(num_hidden_layers="four"), CheckpointMismatchError, "damaged"),
    "activation": (_config(hidden_act="nope"), CheckpointMismatchError, "no model can be built"),
    "positions": (
        _config(rope_parameters={"rope_type": "zzz", "rope_theta": 1e4}),
        CheckpointMismatchError,
        "no model can be built",
    ),
    "padding": (_config(pad_token_id=10**6), CheckpointMismatchError, "no model can be built"),
    "no heads": (_config(num_attention_heads=0), CheckpointMismatchError, "damaged"),
    "generation config": (_generation_config, CheckpointMismatchError, "no model can be built"),
    "wide": (_config(hidden_size=10**15), CheckpointMismatchError, "weights are mismatched"),
    "pruned": (_config(intermediate_size=[48] * 4), UnsupportedModelError, "already pruned"),
    "quantised": (_config(quantization_config={"quant_method": "bitsandbytes"}), UnsupportedModelError, "quantised"),
    "elsewhere": (_config(transformers_weights="../x.safetensors"), UnsupportedModelError, "transformers_weights"),
    "no model": (lambda base: (base / "config.json").unlink(), InvalidInputError, "cannot be read as a model"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoints(fake, base, tmp_path, case):
    damage, error, message = HOSTILE[case]
    damage(base)
    with pytest.raises(error, match=message):
        fake.prune(base, 0.3, method="mcts", output_dir=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_another_model_is_refused(fake, tmp_path, built):
    built["fused"].save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointMismatchError, match="model type"):
        fake.prune(tmp_path / "base", 0.3, method="mcts", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- The command and the Hub -------------------------------------------------------------------------------------------


def test_the_command(fake, base, tmp_path):
    fake.save_pretrained(tmp_path / "pruner")
    out = tmp_path / "out"
    options = {"--pruner": tmp_path / "pruner", "--ratio": 0.4, "--method": "mcts", "--out": out}
    words = [str(word) for option in options.items() for word in option]
    result = CliRunner().invoke(app, ["prune", str(base), *words, "--stream", "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert report["parameters"] == loaded.num_parameters()
    assert report["pruning_config"]["recovery"] == "sketch"
    result = CliRunner().invoke(app, ["prune", str(base), *words, "--stream"])
    assert isinstance(result.exception, InvalidInputError)
    with pytest.raises(InvalidInputError, match="hf upload me/x"):
        CliRunner().invoke(
            app,
            ["prune", str(base), *words[:-1], str(tmp_path / "o"), "--stream", "--push-to", "me/x"],
            catch_exceptions=False,
        )


FROM_HUB = """
from hf_lop.pruner.pruner import LOPPruner
pruner = LOPPruner.from_pretrained("me/pruner")
pruner.prune("me/base", 0.4, method="mcts", output_dir="streamed/out")
"""
IN_MEMORY = """
from hf_lop.pruner.pruner import LOPPruner
LOPPruner.from_pretrained("me/pruner").prune("me/base", 0.4, method="mcts").save_pretrained("memory/out")
"""


@pytest.mark.slow
def test_from_the_hub_only_ranges_are_read(fake, base, tmp_path):
    fake.save_pretrained(tmp_path / "pruner")
    with serve(tmp_path / "hf_home") as hub:
        for name, folder in (("me/base", base), ("me/pruner", tmp_path / "pruner")):
            files = {file: File(data, file.endswith(".safetensors")) for file, data in contents(folder).items()}
            hub.repositories[name] = Repository()
            commit = hub.repositories[name].commit("main", "weights", files)
            if name == "me/base":
                base_commit = commit
        hub.log.clear()
        run_python(FROM_HUB, hub, cwd=tmp_path)
        asked = [(method, status) for method, path, status in hub.log if "me/base" in path and ".safetensors" in path]
        assert ("GET", 206) in asked
        assert ("GET", 200) not in asked
        run_python(IN_MEMORY, hub, cwd=tmp_path)
    assert differences(tmp_path / "memory" / "out", tmp_path / "streamed" / "out") == []
    config = json.loads((tmp_path / "streamed" / "out" / "config.json").read_text())
    assert config["pruning_config"]["base_revision"] == base_commit


def test_what_was_written_is_checked_before_it_appears(built, tmp_path, monkeypatch):
    built["gated"].save_pretrained(tmp_path / "base")
    pruner = fake_pruner(built["gated"])

    def wrong(*arguments):
        header, inside = layout(*arguments)
        return header.replace(b'"F32"', b'"I32"', 1), inside

    with monkeypatch.context() as patch:
        patch.setattr("hf_lop.hub.write.stream.layout", wrong)
        with pytest.raises(CheckpointMismatchError, match=r"is stored as I32, expected torch\.float32"):
            pruner.prune(tmp_path / "base", 0.3, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pruner.prune(tmp_path / "base", 0.3, output_dir=tmp_path / "out")  # nothing of it is gone on with
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.pruning_config
