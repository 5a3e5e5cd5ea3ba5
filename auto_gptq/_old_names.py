"""Every import path of AutoGPTQ that is no file here, and where its names live now.

``import auto_gptq`` appends one finder to ``sys.meta_path``. It answers only for the modules of
``TABLE``, after Python has looked for a file; what it gives are empty modules that import a name's
new home when the name is touched. Files that exist take their old names from the table, too:
``__getattr__ = _old_names.getter(__name__)``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = __name__.rpartition(".")[0]

# Old file in auto_gptq/modeling → class, and the model types it stands for.
MODEL_FILES = {
    "baichuan": "BaiChuanGPTQForCausalLM baichuan",
    "bloom": "BloomGPTQForCausalLM bloom",
    "codegen": "CodeGenGPTQForCausalLM codegen",
    "cohere": "CohereGPTQForCausalLM cohere",
    "decilm": "DeciLMGPTQForCausalLM deci",
    "gemma": "GemmaGPTQForCausalLM gemma",
    "gemma2": "Gemma2GPTQForCausalLM gemma2",
    "gpt2": "GPT2GPTQForCausalLM gpt2",
    "gpt_bigcode": "GPTBigCodeGPTQForCausalLM gpt_bigcode",
    "gpt_neox": "GPTNeoXGPTQForCausalLM gpt_neox",
    "gptj": "GPTJGPTQForCausalLM gptj",
    "internlm": "InternLMGPTQForCausalLM internlm",
    "llama": "LlamaGPTQForCausalLM llama",
    "longllama": "LongLlamaGPTQForCausalLM longllama",
    "minicpm3": "MiniCPM3GPTQForCausalLM minicpm3",
    "mistral": "MistralGPTQForCausalLM mistral",
    "mixtral": "MixtralGPTQForCausalLM mixtral",
    "moss": "MOSSGPTQForCausalLM moss",
    "mpt": "MPTGPTQForCausalLM mpt",
    "opt": "OPTGPTQForCausalLM opt",
    "phi": "PhiGPTQForCausalLM phi",
    "qwen": "QwenGPTQForCausalLM qwen",
    "qwen2": "Qwen2GPTQForCausalLM qwen2",
    "rw": "RWGPTQForCausalLM RefinedWebModel RefinedWeb falcon",
    "stablelmepoch": "StableLMEpochGPTQForCausalLM stablelm_epoch",
    "starcoder2": "Starcoder2GPTQForCausalLM starcoder2",
    "xverse": "XverseGPTQForCausalLM xverse",
    "yi": "YiGPTQForCausalLM Yi",
}
_CLASSES = {file: row.split()[0] for file, row in MODEL_FILES.items()}

_QLINEAR = {
    "qlinear_cuda": "QuantLinearCuda",
    "qlinear_cuda_old": "QuantLinearCudaOld",
    "qlinear_exllama": "QuantLinearExllama",
    "qlinear_exllamav2": "QuantLinearExllamaV2",
    "qlinear_marlin": "QuantLinearMarlin",
}
_RETIRED = ".nn_modules.retired"
_SELECT = ".nn_modules.qlinear.select"
_VARIANTS = ".nn_modules.qlinear.variants"
_MATMUL = ".nn_modules.qlinear.matmul"
_AVAILABLE = ".nn_modules.available"
_UTILS = ".modeling._utils"
_BASE = ".modeling._base"
_AUTO = ".modeling.auto"
_CONST = ".modeling._const"
_PEFT = ".integrations.peft"
_TASKS = ".evaluation.tasks"
_HELPERS = (
    "get_device move_to_device find_layers get_module_by_name_prefix get_module_by_name_suffix "
    "make_quant pack_model autogptq_post_init check_and_get_model_type simple_dispatch_model "
    "make_sure_no_tensor_in_meta_device"
)
_PEFT_NAMES = (
    "GPTQLoraConfig GPTQLoraModel GPTQAdaLoraConfig GPTQAdaLoraModel find_all_linear_names "
    "get_gptq_peft_model"
)
_CONFIG_NAMES = (
    "BaseQuantizeConfig CHECKPOINT_FORMAT CHECKPOINT_FORMAT_FIELD "
    "CHECKPOINT_FORMAT_FIELD_COMPAT_MARLIN QUANT_CONFIG_FILENAME QUANT_METHOD QUANT_METHOD_FIELD"
)
_FLAGS = (
    "TRITON_AVAILABLE AUTOGPTQ_CUDA_AVAILABLE EXLLAMA_KERNELS_AVAILABLE "
    "EXLLAMAV2_KERNELS_AVAILABLE QIGEN_AVAILABLE MARLIN_AVAILABLE"
)
_TRITON = (
    "QuantLinearFunction QuantLinearInferenceOnlyFunction quant_matmul_248 "
    "quant_matmul_inference_only_248 transpose_quant_matmul_248"
)
_FUSED_BASES = "FusedBaseModule FusedBaseAttentionModule FusedBaseMLPModule"

# Old module → {new home: names}; `old=new` where the name itself has changed.
TABLE: dict[str, dict[str, str]] = {
    "": {
        _AUTO: "AutoGPTQForCausalLM",
        ".quantization.config": "BaseQuantizeConfig",
        _UTILS: "exllama_set_max_input_length",
        _PEFT: "get_gptq_peft_model",
    },
    "modeling": {
        _AUTO: "AutoGPTQForCausalLM GPTQ_CAUSAL_LM_MODEL_MAP",
        _BASE: "BaseGPTQForCausalLM",
        ".quantization.config": "BaseQuantizeConfig",
        ".modeling.wrappers": " ".join(_CLASSES.values()),
    },
    "modeling.auto": {_UTILS: "check_and_get_model_type"},
    "modeling._base": {
        _UTILS: f"{_HELPERS} nested_move_to_device get_checkpoints",
        _CONST: "CPU CUDA_0",
        _AVAILABLE: _FLAGS,
        _SELECT: "dynamically_import_QuantLinear",
        ".quantization.config": _CONFIG_NAMES,
        ".quantization.gptq": "GPTQ",
        "accelerate": "load_checkpoint_in_model",
    },
    "modeling._utils": {_CONST: "CPU CUDA_0 EXLLAMA_DEFAULT_MAX_INPUT_LENGTH"},
    **{f"modeling.{file}": {".modeling.wrappers": name} for file, name in _CLASSES.items()},
    "quantization": {
        ".quantization.config": _CONFIG_NAMES,
        ".quantization.gptq": "GPTQ",
        ".quantization.quantizer": "Quantizer quantize",
    },
    "nn_modules": {},
    "nn_modules.qlinear": {
        ".nn_modules.qlinear.linear": "QuantLinear",
        _VARIANTS: "GeneralQuantLinear",
    },
    **{
        f"nn_modules.qlinear.{file}": {_VARIANTS: f"QuantLinear={name}"}
        for file, name in _QLINEAR.items()
    },
    "nn_modules.qlinear.qlinear_triton": {
        _VARIANTS: "QuantLinear=QuantLinearTriton",
        _MATMUL: _TRITON,
    },
    "nn_modules.qlinear.qlinear_tritonv2": {
        _VARIANTS: "QuantLinear=QuantLinearTritonV2",
        _MATMUL: "QuantLinearFunction quant_matmul_248",
    },
    "nn_modules.qlinear.qlinear_hpu": {_RETIRED: "QuantLinear=QuantLinearHpu"},
    "nn_modules.qlinear.qlinear_qigen": {_RETIRED: "QuantLinear=QuantLinearQigen"},
    "nn_modules.triton_utils": {},
    "nn_modules.triton_utils.dequant": {
        _MATMUL: "dequant248 quant_matmul_248 QuantLinearFunction",
    },
    "nn_modules.triton_utils.kernels": {_MATMUL: _TRITON},
    "nn_modules.triton_utils.mixin": {_VARIANTS: "TritonModuleMixin"},
    "nn_modules._fused_base": {_RETIRED: _FUSED_BASES},
    "nn_modules.fused_llama_attn": {_RETIRED: "FusedLlamaAttentionForQuantizedModel"},
    "nn_modules.fused_llama_mlp": {_RETIRED: "FusedLlamaMLPForQuantizedModel"},
    "nn_modules.fused_gptj_attn": {_RETIRED: "FusedGPTJAttentionForQuantizedModel"},
    "utils": {".evaluation.perplexity": "Perplexity"},
    "utils.import_utils": {
        _SELECT: "dynamically_import_QuantLinear",
        _AVAILABLE: f"{_FLAGS} QIGEN_EXCEPTION MARLIN_EXCEPTION compare_transformers_version "
        "compare_pytorch_version",
    },
    "utils.exllama_utils": {_UTILS: "exllama_set_max_input_length"},
    "utils.peft_utils": {
        _PEFT: _PEFT_NAMES,
        _VARIANTS: "QuantLinearCuda QuantLinearCudaOld QuantLinearExllama QuantLinearExllamaV2 "
        "QuantLinearTriton",
        _RETIRED: "QuantLinearHpu QuantLinearQigen",
    },
    "utils.data_utils": {".calibration.blocks": "make_data_block collate_data get_dataloader"},
    "utils.perplexity_utils": {".evaluation.perplexity": "Perplexity"},
    "utils.accelerate_utils": {"accelerate": "load_checkpoint_in_model"},
    "utils.marlin_utils": {
        _AVAILABLE: "_validate_marlin_device_support",
        _SELECT: "_validate_marlin_compatibility=marlin_refusal",
    },
    "utils.modeling_utils": {_UTILS: "recurse_getattr recurse_setattr"},
    "eval_tasks": {
        _TASKS: "LanguageModelingTask SequenceClassificationTask TextSummarizationTask "
        "get_predictions",
    },
    "eval_tasks.language_modeling_task": {_TASKS: "LanguageModelingTask"},
    "eval_tasks.sequence_classification_task": {
        _TASKS: "SequenceClassificationTask get_predictions"
    },
    "eval_tasks.text_summarization_task": {_TASKS: "TextSummarizationTask"},
}


def homes(module: str) -> dict[str, tuple[str, str]]:
    """Give name → (module, name there) for an old module, called by its full name."""
    found = {}
    for home, names in TABLE.get(module.partition(".")[2], {}).items():
        for name in names.split():
            old, _, new = name.partition("=")
            found[old] = (home, new or old)
    return found


def getter(module: str) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a module: its old names, then its submodules."""
    known = homes(module)

    def __getattr__(name: str) -> Any:
        if name in known:
            home, new = known[name]
            return getattr(importlib.import_module(home, _PACKAGE), new)
        below = f"{module}.{name}"
        is_package = "__path__" in vars(sys.modules[module])
        if is_package and not name.startswith("__") and importlib.util.find_spec(below):
            return importlib.import_module(below)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


class _OldModules(MetaPathFinder, Loader):
    """Finds and makes the modules of the table that are no files."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = fullname.partition(".")
        if package != _PACKAGE or not module or module not in TABLE:
            return None
        below = any(other.startswith(f"{module}.") for other in TABLE)
        return ModuleSpec(fullname, self, origin="auto_gptq._old_names", is_package=below)

    def exec_module(self, module: ModuleType) -> None:
        names = sorted(homes(module.__name__))
        module.__doc__ = "An import path of AutoGPTQ; see auto_gptq/_old_names.py."
        vars(module).update(
            __all__=names, __getattr__=getter(module.__name__), __dir__=lambda: names
        )


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())
