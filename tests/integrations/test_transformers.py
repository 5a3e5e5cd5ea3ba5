"""Plain transformers loads, makes and saves GPTQ models once ``auto_gptq`` is imported."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import transformers
from packaging.version import parse
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, CompileConfig, GPTQConfig
from transformers.quantizers import auto

from auto_gptq import AutoGPTQForCausalLM
from auto_gptq.errors import CheckpointError, ConfigError
from auto_gptq.integrations import transformers as ours
from auto_gptq.integrations.hf_quantizer import AutoGPTQHfQuantizer
from auto_gptq.nn_modules.qlinear import QuantLinear
from tests.integrations.checkpoints import (
    IDS,
    PACKED,
    dense_twin,
    edited,
    make,
    settings_of,
    tensors_of,
)
from tests.tiny import MOST, assert_same_logits, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

V5 = parse(transformers.__version__) >= parse("5")
Change = Callable[[dict[str, Tensor], dict[str, Any]], None]

MADE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "2 bits": ("llama", {"bits": 2}, {}),
    "3 bits": ("llama", {"bits": 3, "desc_act": False}, {}),
    "8 bits, one group": ("llama", {"bits": 8, "group_size": -1}, {}),
    "gptq_v2, asymmetric": ("llama", {"checkpoint_format": "gptq_v2", "sym": False}, {}),
    "static groups": ("llama", {"static_groups": True}, {}),
    "some modules": (
        "llama",
        {"dynamic": {r"-:model\.layers\.0\.": {}, r".*down_proj": {"bits": 8}}},
        {},
    ),
    "tied head, packed": ("llama", {"lm_head": True}, {"tie_word_embeddings": True}),
    "biases": ("qwen2", {}, {}),
    "Conv1D": ("gpt2", {}, {}),
    "opt": ("opt", {}, {}),
    "falcon": ("falcon", {}, {}),
}


def _without_g_idx(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"]["desc_act"] = False
    for name in [name for name in tensors if name.endswith("g_idx")]:
        del tensors[name]


def _with_wide_g_idx(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors |= {name: t.long() for name, t in tensors.items() if name.endswith("g_idx")}


def _with_zero_biases(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.endswith("scales")]:
        width = tensors[name].shape[1]
        tensors[name.replace("scales", "bias")] = torch.zeros(width, dtype=torch.float16)


def _with_foreign_settings(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    settings = config["quantization_config"]
    settings["format"] = settings.pop("checkpoint_format")
    settings |= {"dataset": "ptb", "pack_dtype": "int32", "meta": {"quantizer": ["other:1"]}}
    settings |= {"backend": "auto", "modules_in_block_to_quantize": [["self_attn.q_proj"]]}
    del settings["true_sequential"], settings["damp_percent"]


EDITED: dict[str, tuple[str, Change]] = {
    "no g_idx": ("static groups", _without_g_idx),
    "int64 g_idx": ("llama", _with_wide_g_idx),
    "biases of zero": ("llama", _with_zero_biases),
    "another tool's settings": ("llama", _with_foreign_settings),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        folder = root / name.replace(" ", "_")
        if folder.exists():
            return folder
        if name in EDITED:
            base, change = EDITED[name]
            return edited(get(base), folder, change)
        model_type, settings, extra = MADE[name]
        return make(folder, model_type, settings, **extra)

    return get


def _quant_linears(model: Any) -> dict[str, QuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("name", [*MADE, *EDITED])
def test_every_logit_is_that_of_the_dequantized_model(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path, device: torch.device
) -> None:
    folder = checkpoint(name)
    model_type = MADE[EDITED[name][0] if name in EDITED else name][0]
    twin = dense_twin(folder, model_type, tmp_path / "dense")
    wanted = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)(IDS).logits
    packed = {n.rpartition(".")[0] for n in tensors_of(folder) if n.endswith("qweight")}
    # bfloat16 has 8 bits and two blocks of these widths double what one rounding costs, three times
    # over.
    for dtype, tolerance in ((torch.float32, MOST), (torch.bfloat16, 2**-5)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        assert len(_quant_linears(model)) == len(packed)
        assert {p.dtype for p in model.parameters()} == {dtype}
        got = model(IDS.to(device)).logits.float().cpu()
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max(), dtype


@pytest.mark.parametrize("name", [*MADE, *EDITED])
def test_save_pretrained_gives_the_same_bytes_under_the_same_names(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """In bfloat16, whose 8 bits would round the scales."""
    folder = checkpoint(name)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    before, after = tensors_of(folder), tensors_of(tmp_path)
    if name == "biases of zero":
        before = {n: t for n, t in before.items() if not n.endswith("bias")}
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if key.split(".")[-1] in PACKED:
            assert torch.equal(after[key], tensor), key
            assert after[key].dtype == tensor.dtype or name == "int64 g_idx"
    given = settings_of(folder)
    assert {key: settings_of(tmp_path).get(key) for key in given} == given


def _sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    where = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickled(tensors: dict[str, Tensor], folder: Path) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize("write", [_sharded, _pickled])
def test_shards_and_pickles_load_as_one_file_does(
    write: Callable[..., None], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint("llama")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    write(tensors_of(folder), tmp_path)
    wanted = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, wanted)


def test_what_autogptq_saves_is_found_under_its_own_file_name(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    wrapper = AutoGPTQForCausalLM.from_quantized(checkpoint("llama"), device="cpu")
    wrapper.quantize_config.model_file_base_name = None
    wrapper.save_quantized(tmp_path)
    assert (tmp_path / "gptq_model-4bit-32g.safetensors").exists()
    wanted = wrapper(input_ids=IDS).logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(model(IDS).logits, wanted)


@pytest.mark.parametrize("name", ["llama", "Conv1D", "tied head, packed"])
def test_a_base_model_loads_from_the_checkpoint_of_a_model_with_a_head(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    wanted = whole(IDS, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(base(IDS).last_hidden_state, wanted)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_writes_what_the_dequantized_model_writes(
    cache: str | None, checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32)
    model.to(device)
    dense = copy.deepcopy(model).dequantize()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options["disable_compile"] = True  # on a GPU a static cache would mean to compile
    ids = IDS.repeat(2, 1).to(device)
    wanted = dense.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation=cache, **options), wanted)


def test_generate_compiles_the_model_as_one_graph(
    checkpoint: Callable[[str], Path], device: torch.device
) -> None:
    """With a static cache on a GPU transformers compiles what says that it can be compiled."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32)
    model.to(device)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = IDS.to(device)
    wanted = model.generate(ids, **options)
    how = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    how._compile_all_devices = True  # transformers' own tests compile on a CPU by this
    torch._dynamo.utils.counters.clear()
    found = model.generate(ids, cache_implementation="static", compile_config=how, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch.equal(found, wanted)


def test_dequantize_leaves_a_plain_model_that_can_be_saved(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32)
    wanted = model(IDS).logits
    dense = model.dequantize()
    assert not _quant_linears(dense)
    assert_same_logits(dense(IDS).logits, wanted)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(back(IDS).logits, dense(IDS).logits)


def test_the_device_map_auto_and_a_users_config_are_taken(
    checkpoint: Callable[[str], Path],
) -> None:
    folder = checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    ids = IDS.to(model.device)
    wanted = AutoModelForCausalLM.from_pretrained(folder).to(model.device)(ids).logits
    assert torch.equal(model(ids).logits, wanted)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=GPTQConfig(bits=4))
    assert torch.equal(model.to(ids.device)(ids).logits, wanted)


TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3, "What is measured is managed. " * 4]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_from_pretrained_quantizes_a_full_precision_model(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    full = tiny_model(model_type, dtype=torch.float32)
    full.save_pretrained(tmp_path / "full")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "full")
    config = GPTQConfig(bits=4, group_size=32, dataset=TEXTS, tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", dtype=torch.float32, quantization_config=config
    )
    logits = model(IDS).logits
    error = (logits - full(IDS).logits).norm() / full(IDS).logits.norm()
    assert 0 < error < 0.2
    model.save_pretrained(tmp_path / "packed")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(back(IDS).logits, logits)
    settings = settings_of(tmp_path / "packed")
    assert "dataset" not in settings
    assert settings["desc_act"] is False  # whether transformers asks for group-aware order or not
    assert (settings["quant_method"], settings["checkpoint_format"]) == ("gptq", "gptq")


def test_the_tokenizer_may_be_that_of_the_model_and_the_modules_may_be_chosen(
    tmp_path: Path,
) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = GPTQConfig(bits=4, group_size=32, dataset=TEXTS, desc_act=True)
    config.modules_in_block_to_quantize = [["self_attn.q_proj"], ["mlp.up_proj"]]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert {name.rpartition(".")[2] for name in _quant_linears(model)} == {"q_proj", "up_proj"}


def test_quantizing_without_a_dataset_says_what_to_do(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="needs a dataset"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GPTQConfig(bits=4))


def _drop_scales(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors["model.layers.1.mlp.up_proj.scales"]


def _misshape_zeros(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """transformers 5.17 takes this silently and reads wrong zero points."""
    name = "model.layers.1.mlp.up_proj.qzeros"
    tensors[name] = tensors[name][:1].clone()


def _drop_act_order(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors["model.layers.0.self_attn.q_proj.g_idx"]


def _real_bias(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)


def _infinite(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.0.self_attn.q_proj.scales"][0, 0] = torch.inf


def _dense(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.split(".")[-1] in PACKED]:
        del tensors[name]


def _elsewhere(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".mlp." in name]:
        tensors[name.replace(".mlp.", ".moe.")] = tensors.pop(name)


DAMAGED: dict[str, tuple[Change, str]] = {
    "missing": (_drop_scales, r"lacks 1 tensors: model\.layers\.1\.mlp\.up_proj\.scales"),
    "misshapen": (_misshape_zeros, r"up_proj\.qzeros has shape \[1, 12\]"),
    "missing order": (_drop_act_order, r"lacks 1 tensors: .*g_idx"),
    "bias": (_real_bias, "64 values other than 0, but the model's linear has no bias"),
    "infinite": (_infinite, "holds NaN or infinity"),
    "not packed": (_dense, "holds no packed weights"),
    "another model": (_elsewhere, "are no linear layers of LlamaForCausalLM"),
}


@pytest.mark.parametrize(("change", "complaint"), DAMAGED.values(), ids=DAMAGED)
def test_a_checkpoint_that_does_not_fit_is_refused(
    change: Change, complaint: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = edited(checkpoint("llama"), tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=complaint):
        AutoModelForCausalLM.from_pretrained(folder)


def test_models_without_gptq_load_as_ever(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(back(IDS).logits, model(IDS).logits)
    assert not _quant_linears(back)


def test_disable_gives_the_place_back_and_enable_takes_it_again() -> None:
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is AutoGPTQHfQuantizer
    try:
        ours.disable()
        assert not ours.is_enabled()
        assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__module__.startswith("transformers.")
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is GPTQConfig
        ours.disable()
    finally:
        assert ours.enable()
    assert ours.is_enabled()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is AutoGPTQHfQuantizer


def test_gptqmodel_keeps_its_place_unless_we_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"gptqmodel": "7.7.0", "optimum": "2.3.0"}
    monkeypatch.setattr("importlib.metadata.version", installed.__getitem__)
    ours.disable()
    try:
        assert not ours.enable(even_beside_gptqmodel=False)
        assert not ours.is_enabled()
        installed["gptqmodel"] = "5.8.0"  # too old for optimum: it would not work
        assert ours.enable(even_beside_gptqmodel=False)
    finally:
        ours.enable()
    assert ours.is_enabled()


_PROBE = """
import sys
before = list(sys.meta_path)
import auto_gptq
from auto_gptq.integrations import transformers as ours
assert not [m for m in ("torch", "transformers") if m in sys.modules]
assert ours.is_enabled()
if sys.argv[1] == "off":
    ours.disable()
    assert not ours.is_enabled()
import transformers
import transformers.quantizers.auto as auto
kind = auto.AUTO_QUANTIZER_MAPPING["gptq"].__module__
assert kind.startswith("auto_gptq." if sys.argv[1] == "on" else "transformers."), kind
assert type(auto.__spec__.loader) is type(transformers.__spec__.loader)
assert not [f for f in sys.meta_path if f.__class__.__module__ == ours.__name__]
"""


@pytest.mark.parametrize("switch", ["on", "off"])
def test_transformers_learns_of_us_only_when_it_is_loaded(switch: str) -> None:
    command = [sys.executable, "-c", _PROBE, switch]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
