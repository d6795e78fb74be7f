"""What importing hf_lop does to a process, and what it leaves alone. Each check needs a Python of its own."""

import resource
import subprocess
import sys

import pytest

import hf_lop
from tests.small_models import CONFIGS


def python(code):
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_import_and_help_load_neither_torch_nor_transformers():
    code = """
import sys
import hf_lop, hf_lop.cli, hf_lop.demo
from typer.testing import CliRunner
assert CliRunner().invoke(hf_lop.cli.app, ["--help"]).exit_code == 0
assert CliRunner().invoke(hf_lop.cli.app, ["prune", "--help"]).exit_code == 0
print(sorted({"torch", "transformers", "matplotlib", "datasets", "numpy"} & set(sys.modules)))
"""
    assert python(code).strip() == "[]"


def test_help_takes_less_than_half_a_second():
    times = [1.0]
    while min(times) >= 0.5 and len(times) < 6:  # processor time: what others do must not fail a test
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python("import sys; sys.argv = ['hf-lop', '--help']; from hf_lop.cli import main; main()")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import hf_lop, transformers", "import transformers, hf_lop"])
def test_hook_is_there_in_either_order_and_only_once(order):
    code = f"""
{order}
from transformers import PreTrainedConfig, LlamaConfig
import hf_lop.units.modeling_lop as m
hooked = PreTrainedConfig.from_dict.__func__
assert hooked._lop
m.install()
assert PreTrainedConfig.from_dict.__func__ is hooked
config = LlamaConfig.from_dict(dict(intermediate_size=[3, 2], num_hidden_layers=2, hidden_size=8, num_attention_heads=2))
print(config.intermediate_size)
"""
    assert python(code).strip() == "[3, 2]"


@pytest.mark.slow
def test_ordinary_configs_and_models_are_untouched():
    code = """
import hf_lop, torch
from transformers import LlamaConfig, LlamaForCausalLM, Gemma3nTextConfig
before = LlamaForCausalLM.__init__
config = LlamaConfig.from_dict(LlamaConfig().to_dict())
assert LlamaForCausalLM.__init__ is before
try:
    LlamaConfig(intermediate_size="wide")
except Exception as error:
    print(type(error).__name__)
own = Gemma3nTextConfig.from_dict(Gemma3nTextConfig().to_dict())  # reads lists by itself
assert isinstance(own.intermediate_size, list)
assert "_lop_enabled" not in vars(Gemma3nTextConfig)
"""
    assert python(code).strip() == "StrictDataclassFieldValidationError"


def test_stock_save_of_an_ordinary_model_is_as_before(built, tmp_path):
    for kind in CONFIGS:
        built[kind].save_pretrained(tmp_path / kind)
        names = {path.name for path in (tmp_path / kind).iterdir()}
        assert names <= {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("old", "new"),
    [("find_ffns", "find_units"), ("slice_ffns", "slice_units"), ("neuron_importance", "unit_importance")],
)
def test_names_of_the_version_before_say_what_they_are_now(old, new):
    with pytest.raises(AttributeError, match=rf"hf_lop\.{old} is hf_lop\.{new} since version 0\.2"):
        getattr(hf_lop, old)
    assert callable(getattr(hf_lop, new))
