"""Scripts as tutorials and model cards have them, and what people get wrong in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTQConfig, TextGenerationPipeline, pipeline

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.errors import CheckpointError, ConfigError, MissingFileError, QuantizedStateError
from tests.tiny import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

TEXT = (
    "auto-gptq is an easy-to-use model quantization library with user-friendly apis, based on "
    "GPTQ algorithm."
)
NO_GPU = not torch.cuda.is_available()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tutorial") / "opt-125m"
    tiny_model(hidden_size=128, intermediate_size=256).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    """What the first example of AutoGPTQ's README makes."""
    folder, tokenizer = dense.parent / "opt-125m-4bit", tiny_tokenizer()
    examples = [tokenizer(TEXT)]
    config = BaseQuantizeConfig(bits=4, group_size=128, desc_act=False)
    model = AutoGPTQForCausalLM.from_pretrained(str(dense), config)
    model.quantize(examples)
    model.save_quantized(str(folder))
    model.save_quantized(str(folder), use_safetensors=True)
    tokenizer.save_pretrained(folder)
    return folder


def test_autogptqs_readme(packed: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = AutoGPTQForCausalLM.from_quantized(str(packed), device="cpu")
    inputs = tokenizer("auto_gptq is", return_tensors="pt").to(model.device)
    assert tokenizer.decode(model.generate(**inputs, max_new_tokens=4)[0]).startswith("<s>auto")
    write = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    assert write("auto-gptq is", max_new_tokens=4)[0]["generated_text"].startswith("auto-gptq is")


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g", "gptq_model-4bit-128g.safetensors"])
def test_the_model_cards_of_2023(name: str, packed: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(
        str(packed),
        model_basename=name,
        use_safetensors=True,
        trust_remote_code=True,
        device="cpu",
        use_triton=False,
        quantize_config=None,
    )
    write = pipeline(
        "text-generation",
        model=model,
        tokenizer=tiny_tokenizer(),
        max_new_tokens=4,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        repetition_penalty=1.15,
    )
    assert write("Tell me about AI")[0]["generated_text"].startswith("Tell me about AI")


def test_the_model_cards_of_2024(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        str(packed), device_map="auto", trust_remote_code=False, revision="main"
    )
    write = pipeline(
        "text-generation", model=model, tokenizer=tiny_tokenizer(), max_new_tokens=4, top_k=40
    )
    assert write("Tell me about AI")[0]["generated_text"].startswith("Tell me about AI")


def test_transformers_own_documentation(dense: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = GPTQConfig(bits=4, dataset=[TEXT], tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        dense, device_map="auto", quantization_config=config
    )
    model.to("cpu")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    ids = tokenizer("hello", return_tensors="pt").input_ids
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_settings_of_transformers_are_taken(dense: Path) -> None:
    config: Any = GPTQConfig(bits=8, group_size=64, desc_act=True, sym=False)
    settings = AutoGPTQForCausalLM.from_pretrained(dense, config).quantize_config
    assert (settings.bits, settings.group_size, settings.sym) == (8, 64, False)


def test_a_device_may_be_given_as_a_map(packed: Path) -> None:
    for device_map in ("cpu", torch.device("cpu"), {"": "cpu"}):
        model = AutoGPTQForCausalLM.from_quantized(packed, device_map=device_map)  # type: ignore[arg-type]
        assert model.device.type == "cpu"


WRONG: dict[str, tuple[type[Exception], str, Callable[[Path, Path], Any]]] = {
    "a device that is none": (
        ConfigError,
        r'device is \'gpu\'; it must be a device like "cuda:0"',
        lambda dense, packed: AutoGPTQForCausalLM.from_quantized(packed, device="gpu"),
    ),
    "a map that is none": (
        ConfigError,
        "device_map is 'automatic'.*balanced_low_0",
        lambda dense, packed: AutoGPTQForCausalLM.from_quantized(packed, device_map="automatic"),
    ),
    "no settings": (
        ConfigError,
        r"quantize_config is None; give BaseQuantizeConfig\(bits=4",
        lambda dense, packed: AutoGPTQForCausalLM.from_pretrained(dense, None),  # type: ignore[arg-type]
    ),
    "a quantized model to be quantized": (
        QuantizedStateError,
        r"quantized already \(quant_method 'gptq', 4 bits\).*from_quantized",
        lambda dense, packed: AutoGPTQForCausalLM.from_pretrained(packed, BaseQuantizeConfig()),
    ),
    "no such folder": (
        MissingFileError,
        r"\./no/such/folder is neither a folder \(seen from",
        lambda dense, packed: AutoGPTQForCausalLM.from_quantized("./no/such/folder"),
    ),
    "a group size of text": (
        ConfigError,
        "group_size is '128'",
        lambda dense, packed: BaseQuantizeConfig(group_size="128"),  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize(("error", "message", "call"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_before_anything_is_done(
    error: type[Exception], message: str, call: Any, dense: Path, packed: Path
) -> None:
    with pytest.raises(error, match=message):
        call(dense, packed)


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
@pytest.mark.parametrize(
    "given",
    [
        {"device": "cuda:0"},
        {"device": 0},
        {"device_map": "cuda"},
        {"device_map": {"": 0}},
        {"device_map": "auto", "max_memory": {0: "10GiB", "cpu": "20GiB"}},
    ],
    ids=str,
)
def test_a_gpu_that_is_not_there_is_said(given: dict[str, Any], packed: Path) -> None:
    """torch once said that it was not compiled with CUDA, after the weights had been read."""
    with pytest.raises(ConfigError, match="sees 0 CUDA devices"):
        AutoGPTQForCausalLM.from_quantized(packed, **given)


@pytest.mark.parametrize("by", ["us", "transformers"])
def test_a_download_that_left_a_pointer_of_git_is_told_so(
    by: str, packed: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed, tmp_path / "cloned")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (folder / "gptq_model-4bit-128g.safetensors").write_text(pointer)
    load: Any = AutoModelForCausalLM.from_pretrained
    if by == "us":
        load = AutoGPTQForCausalLM.from_quantized
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load(folder)


def test_a_file_in_place_of_the_folder_to_save_to_is_said(packed: Path, tmp_path: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(packed, device="cpu")
    (tmp_path / "model").write_text("")
    with pytest.raises(ConfigError, match="model is a file; name a folder"):
        model.save_quantized(tmp_path / "model")
