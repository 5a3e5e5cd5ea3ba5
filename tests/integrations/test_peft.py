"""Adapters on a quantized model, through PEFT itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from auto_gptq import BaseQuantizeConfig
from auto_gptq.errors import ConfigError, DerivedWeightError
from auto_gptq.integrations import peft as ours
from auto_gptq.modeling import BaseGPTQForCausalLM
from auto_gptq.nn_modules.qlinear import QuantLinear
from tests.integrations.checkpoints import make
from tests.integrations.test_experts import TYPES, V5, pack, tiny_moe, write
from tests.tiny import tiny_examples, tiny_model

peft = pytest.importorskip("peft", reason="peft is not installed: pip install auto-gptq[peft]")

CPU = torch.device("cpu")
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def quantized() -> BaseGPTQForCausalLM:
    torch.manual_seed(0)
    config = BaseQuantizeConfig(bits=4, group_size=32)
    wrapper = BaseGPTQForCausalLM(tiny_model(dtype=torch.float32), False, config)
    wrapper.quantize(tiny_examples())
    return wrapper


@pytest.fixture
def wrapper(quantized: BaseGPTQForCausalLM) -> BaseGPTQForCausalLM:
    return copy.deepcopy(quantized)


COMMON: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, **COMMON),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **COMMON),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=99, tinit=9, **COMMON),
    "IA3": lambda: peft.IA3Config(**COMMON | IA3),
    "LoHa": lambda: peft.LoHaConfig(r=4, **COMMON),
    "LoKr": lambda: peft.LoKrConfig(r=4, **COMMON),
    "VeRA": lambda: peft.VeraConfig(r=4, **COMMON),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, **COMMON),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("peft") / "packed", "llama", {})


def _load(folder: Path, device: torch.device = CPU) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def _train(model: Any, steps: int = 5) -> list[float]:
    ids = torch.arange(2, 34, device=model.device).repeat(2, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for step in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if model.peft_type == "ADALORA":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make_config", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_learns_and_comes_back_the_same(
    make_config: Callable[[], Any], wrapper: BaseGPTQForCausalLM, tmp_path: Path
) -> None:
    fresh = copy.deepcopy(wrapper)
    packed = [m.qweight.clone() for m in wrapper.modules() if isinstance(m, QuantLinear)]
    model = ours.get_gptq_peft_model(wrapper, make_config(), train_mode=True)
    losses = _train(model)
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(layer.qweight, before)
        for layer, before in zip(
            (m for m in model.modules() if isinstance(m, QuantLinear)), packed, strict=True
        )
    )
    model.eval().save_pretrained(tmp_path)
    back = ours.get_gptq_peft_model(fresh, model_id=str(tmp_path)).eval()
    ids = torch.arange(2, 20)[None]
    assert torch.equal(back(input_ids=ids).logits, model(input_ids=ids).logits)
    with model.disable_adapter():
        assert not torch.equal(back(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("make_config", ADAPTERS.values(), ids=ADAPTERS)
def test_plain_peft_trains_a_model_that_plain_transformers_loaded(
    make_config: Callable[[], Any], checkpoint: Path, tmp_path: Path, device: torch.device
) -> None:
    model = peft.prepare_model_for_kbit_training(
        _load(checkpoint, device), use_gradient_checkpointing=False
    )
    model = peft.get_peft_model(model, make_config())
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:  # PEFT 0.21 trains AdaLoRA's ranks and does not save them
            parameter.requires_grad_(False)
    losses = _train(model)
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(_load(checkpoint, device), tmp_path).eval()
    ids = torch.arange(2, 20, device=device)[None]
    assert torch.equal(back(input_ids=ids).logits, model(input_ids=ids).logits)
    assert "base_layer" not in "".join(load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("by", ["us", "PEFT"])
def test_experts_are_adapted_and_come_back(
    model_type: str, by: str, tmp_path: Path, device: torch.device
) -> None:
    """PEFT once rewrote these targets for fused tensors, and trained q_proj alone."""
    dense = tiny_moe(model_type)
    pack(dense)
    write(dense, tmp_path / "packed", TYPES[model_type] if V5 else None)
    down = "w2" if model_type == "mixtral" else "down_proj"
    config = peft.LoraConfig(r=4, target_modules=["q_proj", down], task_type="CAUSAL_LM")
    base = _load(tmp_path / "packed", device)
    if by == "us":
        model = ours.get_gptq_peft_model(base, config, auto_find_all_linears=False, train_mode=True)
    else:
        with ours.adapting_experts():
            model = peft.get_peft_model(base, config)
    adapted = [n for n, _ in model.named_modules() if n.endswith("lora_A.default")]
    experts = sum(isinstance(m, QuantLinear) for n, m in model.named_modules() if f".{down}" in n)
    assert len(adapted) == 2 + experts
    assert experts >= 8
    losses = _train(model)
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    fresh = _load(tmp_path / "packed", device)
    if by == "us":
        back = ours.get_gptq_peft_model(fresh, model_id=str(tmp_path / "adapter"))
    else:
        with ours.adapting_experts():
            back = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    ids = torch.arange(2, 20, device=device)[None]
    assert torch.equal(back.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_peft_is_left_as_it_was(wrapper: BaseGPTQForCausalLM) -> None:
    module = pytest.importorskip("peft.utils.transformers_weight_conversion")
    before = dict(vars(module))
    with pytest.raises(RuntimeError), ours.adapting_experts():
        assert vars(module) != before
        raise RuntimeError
    assert vars(module) == before


def test_training_keeps_no_dense_copy_of_a_weight(wrapper: BaseGPTQForCausalLM) -> None:
    """The gradient dequantizes anew; only packed tensors and activations wait for it."""
    model = ours.get_gptq_peft_model(wrapper, ADAPTERS["LoRA"](), train_mode=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.arange(2, 10)[None]).logits.sum()
    shapes = {tuple(t.shape) for t in kept if t.is_floating_point()}
    dense = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, QuantLinear)}
    assert kept
    assert not shapes & (dense | {(columns, rows) for rows, columns in dense})


@pytest.mark.parametrize("make_config", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_into_packed_weights_raises(
    make_config: Callable[[], Any], merge: str, wrapper: BaseGPTQForCausalLM
) -> None:
    """For IA3, LoHa and OFT it once seemed to succeed and changed nothing."""
    model = ours.get_gptq_peft_model(wrapper, make_config(), train_mode=True)
    with pytest.raises(DerivedWeightError, match="load the full-precision model") as caught:
        getattr(model, merge)()
    assert isinstance(caught.value, NotImplementedError)  # what AutoGPTQ raised


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_initialization_that_changes_the_weights_raises(
    init: str, wrapper: BaseGPTQForCausalLM
) -> None:
    config = peft.LoraConfig(r=4, init_lora_weights=init, **COMMON)
    with pytest.raises(DerivedWeightError):
        ours.get_gptq_peft_model(wrapper, config, train_mode=True)


def test_peft_needs_no_help_from_us(wrapper: BaseGPTQForCausalLM) -> None:
    model = peft.get_peft_model(wrapper.model, ADAPTERS["LoRA"]())
    adapted = {n.split(".")[-3] for n, _ in model.named_modules() if n.endswith("lora_A.default")}
    assert adapted == LINEARS


@pytest.mark.parametrize("kind", ["Lora", "AdaLora"])
def test_the_settings_are_converted_and_the_given_ones_left_alone(
    kind: str, wrapper: BaseGPTQForCausalLM
) -> None:
    steps = {"total_step": 10} if kind == "AdaLora" else {}
    given = getattr(peft, f"{kind}Config")(
        target_modules=["q_proj"], task_type="CAUSAL_LM", **steps
    )
    made = ours.get_gptq_peft_model(wrapper, given, train_mode=True).peft_config["default"]
    wanted = getattr(ours, f"GPTQ{kind}Config")
    assert isinstance(made, wanted)
    assert issubclass(wanted, type(given))
    assert made.target_modules == LINEARS
    assert given.target_modules == {"q_proj"}
    assert not made.injected_fused_attention
    assert not made.injected_fused_mlp
    assert "injected_fused_mlp" not in made.to_dict()
    assert pickle.loads(pickle.dumps(made)) == made


def test_the_targets_may_be_chosen(wrapper: BaseGPTQForCausalLM) -> None:
    config = ours.GPTQLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = ours.get_gptq_peft_model(wrapper, config, auto_find_all_linears=False, train_mode=True)
    assert sum(name.endswith("lora_A.default") for name, _ in model.named_modules()) == 2


def test_adaption_prompts_go_into_no_more_blocks_than_there_are(
    wrapper: BaseGPTQForCausalLM,
) -> None:
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=30, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="looks for a parameter"):
        ours.get_gptq_peft_model(wrapper, config, train_mode=True)
    wrapper = BaseGPTQForCausalLM(tiny_model(), False, BaseQuantizeConfig(bits=4))
    model = ours.get_gptq_peft_model(wrapper, config, train_mode=True)
    assert model.peft_config["default"].adapter_layers == 2
    assert config.adapter_layers == 30


def test_linear_names_leave_out_the_head_and_what_is_ignored(wrapper: BaseGPTQForCausalLM) -> None:
    assert set(ours.find_all_linear_names(wrapper)) == LINEARS
    assert set(ours.find_all_linear_names(wrapper.model, ["q_proj"])) == LINEARS - {"q_proj"}
    assert set(ours.find_all_linear_names(wrapper, None, False)) == LINEARS | {"lm_head"}


@pytest.mark.parametrize("train_mode", [True, False])
def test_what_is_missing_is_named(train_mode: bool, wrapper: BaseGPTQForCausalLM) -> None:
    with pytest.raises(ValueError, match="peft_config" if train_mode else "model_id"):
        ours.get_gptq_peft_model(wrapper, train_mode=train_mode)


@pytest.mark.parametrize("kind", ["LoraConfig", "LoraModel", "AdaLoraConfig", "AdaLoraModel"])
def test_autogptq_s_classes_are_peft_s(kind: str) -> None:
    made = getattr(ours, f"GPTQ{kind}")
    assert issubclass(made, getattr(peft, kind))
    assert made is getattr(ours, f"GPTQ{kind}")
    assert pickle.loads(pickle.dumps(made)) is made


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="GPTQNothing"):
        _ = ours.GPTQNothing
