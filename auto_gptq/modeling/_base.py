"""The object users hold: a model before, while and after it is quantized."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from .. import _old_names
from ..architectures import Architecture, knows
from ..calibration.examples import make_batches
from ..checkpoint.blocks import DiskWeights
from ..checkpoint.writer import Files
from ..errors import QuantizedStateError
from ..generation.generate import generate
from ..nn_modules.experts import unfuse
from ..nn_modules.surgery import prepare
from ..pipeline.discover import find_or_discover
from ..pipeline.fit import fit_settings
from ..pipeline.quantize import quantize_model
from ..pipeline.ranks import Ranks
from ..pipeline.report import ModuleReport, write_report
from ..quantization.config import QUANTIZE_BLACK_LIST, BaseQuantizeConfig
from . import load, options
from ._const import SUPPORTED_MODELS
from ._utils import check_supported
from .carry import Source, load_generation_config
from .former import FormerMethods
from .limits import longest_sequence, padding_token
from .place import Place, place
from .save import note_packing, save_checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)
__getattr__ = _old_names.getter(__name__)


class BaseGPTQForCausalLM(FormerMethods):
    """A causal language model and its quantization settings.

    Anything this class does not have is looked up on the wrapped ``model``.

    A subclass, or an instance, may say itself where the blocks are (``layers_block_name``), what
    is around them (``outside_layer_modules``) and which linears are quantized, step by step
    (``inside_layer_modules``). Without that the architecture table is asked.
    """

    layer_type: str | None = None
    layers_block_name: str | None = None
    outside_layer_modules: Sequence[str] | None = None
    inside_layer_modules: Sequence[Sequence[str]] | None = None
    lm_head_name: str = "lm_head"
    fused_attn_module_type: ClassVar[type[nn.Module] | None] = None
    fused_mlp_module_type: ClassVar[type[nn.Module] | None] = None

    def __init__(
        self,
        model: PreTrainedModel,
        quantized: bool,
        quantize_config: BaseQuantizeConfig | dict[str, Any],
        is_triton_backend: bool = False,
        injected_fused_attention: bool = False,
        injected_fused_mlp: bool = False,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.model: PreTrainedModel = model
        self.model_type = model.config.model_type
        self._quantized = quantized
        self.quantize_config = options.as_quantize_config(quantize_config)
        self.config: PretrainedConfig = model.config
        self.is_triton_backend = is_triton_backend
        self.injected_fused_attention = injected_fused_attention
        self.injected_fused_mlp = injected_fused_mlp
        self.trainable = trainable
        self.report: list[ModuleReport] = []  # filled by quantize()
        self.calibration_rows = 0  # filled by quantize()
        self.perplexity: dict[str, float] = {}  # yours to fill: text → value, for the model card
        self._source: Source | None = None  # where the model came from, if it was loaded
        self._disk: DiskWeights | None = None  # where its weights are, if not in memory
        self._saves = True  # False on all ranks but one that have quantized it together

    @property
    def quantized(self) -> bool:
        """Tell whether the model's linears are packed."""
        return self._quantized

    @property
    def architecture(self) -> Architecture:
        """The row that says which linears are quantized."""
        if self.layers_block_name is None and self.inside_layer_modules is None:
            return find_or_discover(self.model, self.model_type)
        row = Architecture.from_class_attributes(self, self.model_type)
        # A class of ours says what the table says, which may not suit the model; a user's does.
        return find_or_discover(self.model, self.model_type) if knows(row) else row

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        device = getattr(self.model, "device", None)
        if device is None:
            places = (self.hf_device_map or {}).values()
            device = next((place for place in places if place != "disk"), "cpu")
        return torch.device(device)

    @property
    def hf_device_map(self) -> Mapping[str, Any] | None:
        """Where accelerate has put the parts of the model, if it has."""
        return getattr(self.model, "hf_device_map", None)

    @property
    def _checkpoint_conversion_mapping(self) -> dict[str, str]:
        """Where PEFT finds the weights of an adapter that was trained on the wrapped model.

        lm-evaluation-harness calls ``PeftModel.from_pretrained(wrapper, adapter)``. The names of
        our modules begin with one more "model."; PEFT would leave the adapter untrained.
        """
        children = "|".join(name for name, _ in self.model.named_children())
        return {rf"^(?!model\.(?:{children})\.)": "model."}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet: nothing to fall back to
                raise
            return getattr(self.model, name)

    def to(  # type: ignore[override]
        self, device: Any, *args: Any, **kwargs: Any
    ) -> BaseGPTQForCausalLM:
        """Move the wrapped model."""
        nn.Module.to(self.model, device, *args, **kwargs)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped model."""
        self._check_in_memory()
        return self.model(*args, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        """Do what the wrapped model's ``generate`` does, faster; keyword arguments only."""
        self._check_in_memory()
        with torch.inference_mode():
            return generate(self.model, **kwargs)

    def _check_in_memory(self) -> None:
        if self._disk is not None:
            raise QuantizedStateError(
                "The model's weights are on disk. Save it, and load it with from_quantized()."
            )

    def quantize(
        self,
        examples: Any,
        batch_size: int = 1,
        use_triton: bool = False,
        use_cuda_fp16: bool = True,
        autotune_warmup_after_quantized: bool = False,
        cache_examples_on_gpu: bool = True,
        *,
        tokenizer: Any = None,
        show_progress: bool | None = None,
        work_dir: str | Path | None = None,
    ) -> None:
        """Quantize the model in place, calibrating on examples.

        The options with ``triton``, ``fp16`` and ``autotune`` chose among AutoGPTQ's kernels.

        :param examples: dicts with ``input_ids``, ``attention_mask``; or ids; padding is ignored
        :param tokenizer: for examples that are texts, chats or the name of a text ("python")
        :param batch_size: examples that run through a block at a time
        :param show_progress: draw a bar; None for only on a terminal
        :param work_dir: folder that keeps finished blocks; after a crash, call this again as before
        :raises QuantizedStateError: (an EnvironmentError) if the model is quantized already
        :raises ExamplesError: (a ValueError) if examples are empty or of the wrong form
        :raises ModuleShapeError: (a ValueError) if a linear cannot be packed; nothing is changed
        """
        if self.quantized:
            raise QuantizedStateError("The model is quantized already; load the original again.")
        if self.quantize_config.quant_method in QUANTIZE_BLACK_LIST:
            raise ValueError(
                f"quant_method {self.quantize_config.quant_method!r} can be read but not made; "
                "use 'gptq'."
            )
        options.note_meaningless({"use_triton": use_triton, "use_cuda_fp16": use_cuda_fp16})
        batches = make_batches(
            examples,
            batch_size,
            padding_token(self.config),
            getattr(self.config, "vocab_size", None),
            tokenizer=tokenizer,
            max_length=longest_sequence(self.config),
        )
        unfuse(self.model)
        architecture = self.architecture
        self.quantize_config = fit_settings(self.model, architecture, self.quantize_config)
        self.report = quantize_model(
            self.model,
            architecture,
            self.quantize_config,
            batches,
            show_progress=show_progress,
            work_dir=work_dir,
            disk=self._disk,
        )
        self._saves = Ranks.current().is_first
        if self._disk is None:
            prepare(self.model)
        self.calibration_rows = sum(len(batch.input_ids) for batch in batches)
        note_packing(self.model, self.quantize_config)
        self._quantized = True

    def save_quantized(
        self,
        save_dir: str | Path,
        use_safetensors: bool = True,
        safetensors_metadata: dict[str, Any] | None = None,
        *,
        max_shard_size: int | str | None = None,
        checkpoint_format: str | None = None,
    ) -> None:
        """Write the packed model into a folder that AutoGPTQ, transformers and vLLM can read.

        The tokenizer's files come along from where the model was loaded.

        :param max_shard_size: most bytes a file, or like "2GB"; None for one file
        :param checkpoint_format: "gptq", "gptq_v2" or "marlin"; None for that of the settings
        :raises QuantizedStateError: (an EnvironmentError) if the model is not quantized
        :raises CheckpointError: (a ValueError) naming the layer that the format cannot hold
        """
        if not self.quantized:
            raise QuantizedStateError("The model is not quantized yet; call quantize() first.")
        if not self._saves:
            return
        save_checkpoint(
            self.model,
            self.quantize_config,
            save_dir,
            files=Files(use_safetensors, max_shard_size),
            safetensors_metadata=safetensors_metadata,
            checkpoint_format=checkpoint_format,
            source=self._source,
            disk=self._disk,
        )
        if self.report:
            write_report(self.report, Path(save_dir), self.quantize_config.damp_percent)
        self.quantize_config.model_name_or_path = str(save_dir)

    def push_to_hub(
        self,
        repo_id: str,
        save_dir: str | Path | None = None,
        use_safetensors: bool = True,
        safetensors_metadata: dict[str, Any] | None = None,
        commit_message: str = "Upload of AutoGPTQ quantized model",
        use_auth_token: bool | str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Upload the files of a saved model to the Hub, and give the commit.

        :param save_dir: save the model there first; None to upload what was saved or loaded last
        :param use_auth_token: older name of ``token``
        :raises ConfigError: (a ValueError) if there is nothing saved to upload
        """
        from .publish import push_to_hub

        return push_to_hub(
            self,
            repo_id,
            save_dir,
            use_safetensors,
            safetensors_metadata,
            commit_message,
            use_auth_token,
            private,
            token,
            create_pr,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig | dict[str, Any],
        max_memory: dict[Any, Any] | None = None,
        trust_remote_code: bool = False,
        torch_dtype: torch.dtype = torch.float16,
        **model_init_kwargs: Any,
    ) -> BaseGPTQForCausalLM:
        """Load a full-precision model in order to quantize it.

        :param max_memory: bytes per device ({0: "20GIB", "cpu": "30GIB"}); given that, the model
            is spread over those devices
        :param device_map: among ``model_init_kwargs``; "disk" leaves the weights in their files,
            for models larger than memory: quantize(..., work_dir=folder) reads a block at a time
        """
        model_config = load.load_config(
            pretrained_model_name_or_path, trust_remote_code, **model_init_kwargs
        )
        check_supported(model_config.model_type, SUPPORTED_MODELS, model_config)
        options.check_dense(pretrained_model_name_or_path, model_config)
        quantize_config = options.as_quantize_config(quantize_config)
        Place.of(None, None, max_memory)
        model_init_kwargs = options.for_transformers(model_init_kwargs)
        torch_dtype = options.as_dtype(model_init_kwargs.pop("dtype", torch_dtype)) or torch.float16
        if max_memory is not None:
            model_init_kwargs |= {"max_memory": max_memory, "device_map": "auto"}
        opened = model_init_kwargs.get("device_map") == "disk"
        model, disk = (load.open_dense if opened else load.load_dense)(
            pretrained_model_name_or_path, torch_dtype, trust_remote_code, **model_init_kwargs
        )
        wrapper = cls(model, False, quantize_config)
        wrapper._disk = disk
        wrapper._source = Source.of(pretrained_model_name_or_path, model_init_kwargs)
        wrapper._set_seqlen()
        return wrapper

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str | Path,
        device_map: str | dict[str, Any] | None = None,
        max_memory: dict[Any, Any] | None = None,
        device: str | int | torch.device | None = None,
        low_cpu_mem_usage: bool = False,
        use_triton: bool = False,
        use_qigen: bool = False,
        use_marlin: bool = False,
        torch_dtype: torch.dtype | None = None,
        inject_fused_attention: bool = False,
        inject_fused_mlp: bool = False,
        use_cuda_fp16: bool = True,
        quantize_config: BaseQuantizeConfig | dict[str, Any] | None = None,
        model_basename: str | None = None,
        use_safetensors: bool = True,
        trust_remote_code: bool = False,
        warmup_triton: bool = False,
        trainable: bool = False,
        disable_exllama: bool | None = None,
        disable_exllamav2: bool = False,
        use_tritonv2: bool = False,
        checkpoint_format: str | None = None,
        **kwargs: Any,
    ) -> BaseGPTQForCausalLM:
        """Load a quantized checkpoint from a folder or the Hub.

        The flags that chose among AutoGPTQ's kernels are accepted and mean nothing here; other
        arguments that nobody knows are ignored. Both is logged.

        :param attn_implementation: which attention of transformers to use, among ``kwargs``
        :param torch_dtype: dtype of activations and dense weights; None for float16 on a GPU and
            float32 on a CPU, which multiplies 16-bit numbers slowly
        :raises MissingFileError: (a FileNotFoundError) if no weights are found
        :raises CheckpointError: (a ValueError) if files or tensors are damaged, missing or misfit
        """
        options.note_unknown(kwargs, "attn_implementation", "dtype")
        options.note_meaningless(locals())
        where = Place.of(device, device_map, max_memory)  # before anything takes its time
        model_config = load.load_config(model_name_or_path, trust_remote_code, **kwargs)
        check_supported(model_config.model_type, SUPPORTED_MODELS, model_config)
        if kwargs.get("attn_implementation"):
            model_config._attn_implementation = kwargs["attn_implementation"]
        settings = options.as_settings(
            quantize_config, model_name_or_path, checkpoint_format, kwargs
        )
        weights = load.find_quantized_weights(
            model_name_or_path, settings, model_basename, use_safetensors, **kwargs
        )
        torch_dtype = options.as_dtype(torch_dtype or kwargs.get("dtype"))
        if torch_dtype is None:
            on_cpu = where.device is not None and where.device.type == "cpu"
            fast_half = torch.cuda.is_available() and not on_cpu
            torch_dtype = torch.float16 if fast_half else torch.float32
        model = load.load_packed(model_config, weights, settings, torch_dtype, trust_remote_code)
        load_generation_config(model, Source.of(model_name_or_path, kwargs))
        place(model, where.device, where.device_map, where.max_memory)
        note_packing(model, settings)
        settings.model_name_or_path = str(model_name_or_path)
        settings.model_file_base_name = weights.base_name
        wrapper = cls(model, True, settings, use_triton or use_tritonv2, trainable=trainable)
        wrapper._source = Source.of(model_name_or_path, kwargs)
        wrapper._set_seqlen()
        if trainable:
            wrapper.enable_trainable_mode()
        return wrapper

    def _set_seqlen(self) -> None:
        self.model.__dict__["seqlen"] = longest_sequence(self.config) or 4096
