"""``BaseQuantizeConfig``: the settings of a quantization and their JSON form."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import InitVar, asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import hub
from ..errors import ConfigError, MissingFileError
from .dynamic import check_patterns, find_override, known_settings_only
from .presets import PRESETS

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT_FIELD = "checkpoint_format"
CHECKPOINT_FORMAT_FIELD_COMPAT_MARLIN = "is_marlin_format"
QUANT_METHOD_FIELD = "quant_method"
QUANT_CONFIG_FILENAME = "quantize_config.json"


class CHECKPOINT_FORMAT:
    """Names of the tensor layouts in a checkpoint."""

    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"
    MARLIN = "marlin"
    AWQ_GEMM = "gemm"


class QUANT_METHOD:
    """Names of the quantization methods."""

    GPTQ = "gptq"
    AWQ = "awq"


QUANT_METHOD_FORMAT_MAPPING = {
    QUANT_METHOD.GPTQ: {
        CHECKPOINT_FORMAT.GPTQ,
        CHECKPOINT_FORMAT.GPTQ_V2,
        CHECKPOINT_FORMAT.MARLIN,
    },
    QUANT_METHOD.AWQ: {CHECKPOINT_FORMAT.AWQ_GEMM},
}
QUANTIZE_BLACK_LIST = {QUANT_METHOD.AWQ}  # can be read, not made
QUANT_CONFIG_ARG_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}

# Fields of 0.7.1.
_OLD_SPELLINGS = (CHECKPOINT_FORMAT_FIELD_COMPAT_MARLIN, "awq_gemm_checkpoint")
# Formats whose tensors cannot hold an activation order.
ORDERLESS = {CHECKPOINT_FORMAT.MARLIN, CHECKPOINT_FORMAT.AWQ_GEMM}
_ALL_FORMATS = set().union(*QUANT_METHOD_FORMAT_MAPPING.values())
# What AWQ's tools call their other layouts, which nothing here can read.
_FOREIGN_VERSIONS = {"gemv", "gemv_fast", "llm-awq", "exllama", "ipex", "marlin"}
# Keys that are understood without being settings.
_READ_BESIDES = {"version", "zero_point", "format", CHECKPOINT_FORMAT_FIELD_COMPAT_MARLIN}
# Settings that AutoGPTQ did not have.
_OWN_FIELDS = (
    "scale_search",
    "signed_scales",
    "correction",
    "tuning_epochs",
    "scale_epochs",
    "lm_head",
    "dynamic",
    "expert_share",
)
# What numbers and flags may be; a JSON file may hold anything.
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "damp_percent": (lambda x: 0 < x < 1, "lie between 0 and 1, usually 0.01"),
    "correction": (lambda x: 0 <= x <= 1, "lie between 0 (none) and 1, usually 0.5"),
    "tuning_epochs": (lambda x: x >= 0 and x == int(x), "be a whole number, 0 or more"),
    "scale_epochs": (lambda x: x >= 0 and x == int(x), "be a whole number, 0 or more"),
    "expert_share": (lambda x: x >= 0, "be 0 or more, usually 0.25"),
}
_FLAGS = (
    "desc_act",
    "static_groups",
    "sym",
    "true_sequential",
    "scale_search",
    "signed_scales",
    "lm_head",
)
# Where a configuration may lie in a model folder, in the order of trying.
_CONFIG_FILES = (QUANT_CONFIG_FILENAME, "quant_config.json", "config.json")


@dataclass
class BaseQuantizeConfig:
    """Settings of a quantization, with AutoGPTQ's names, order and defaults.

    :param bits: width of a code: 2, 3, 4 or 8
    :param group_size: inputs that share a scale; -1 for one scale per output row
    :param damp_percent: damping added to the Hessian's diagonal, as a share of its mean
    :param desc_act: solve columns in descending order of activation size ("act-order")
    :param static_groups: with ``desc_act``, keep groups contiguous, so that ``g_idx`` is trivial
    :param sym: zero point fixed at the middle code
    :param true_sequential: solve the steps of a block one after another, each on fresh activations
    :param quant_method: "gptq", or "awq" for a checkpoint that is only read
    :param checkpoint_format: layout of the tensors on disk
    :param model_name_or_path: where the quantized model came from or was saved to
    :param model_file_base_name: file name of the weights without its extension
    :param scale_search: choose the scales by the error they cause; False for AutoGPTQ's min-max
    :param signed_scales: let that choice take negative scales; symmetric grids gain by it
    :param correction: share of the drift from the full-precision model that every linear makes up
        for, from 0 to 1
    :param tuning_epochs: passes over the calibration tokens in which the codes and scales of each
        block are tuned by gradients; 0 for GPTQ alone
    :param scale_epochs: passes over the calibration tokens in which the scales of all blocks are
        tuned together for the logits, at the end; the model must fit on the device for it
    :param lm_head: quantize the output head too; one tied to the embedding is untied
    :param dynamic: settings of some modules, by pattern: see :mod:`.dynamic`
    :param expert_share: an expert sees at least this share of the tokens that even routing would
        give it; 0 for only those routed to it, a large number for all
    :param is_marlin_format: 0.7.1's way to say ``checkpoint_format="marlin"``
    :param awq_gemm_checkpoint: 0.7.1's way to say AWQ's format "gemm"
    :raises ConfigError: (a ValueError) if a value cannot work
    """

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    quant_method: str = QUANT_METHOD.GPTQ
    checkpoint_format: str = CHECKPOINT_FORMAT.GPTQ
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None
    scale_search: bool = True
    signed_scales: bool = False
    correction: float = 0.0
    tuning_epochs: int = 0
    scale_epochs: int = 0
    lm_head: bool = False
    dynamic: dict[str, dict[str, Any]] | None = None
    expert_share: float = 0.25
    is_marlin_format: InitVar[bool] = False
    awq_gemm_checkpoint: InitVar[bool] = False

    def __post_init__(self, is_marlin_format: bool, awq_gemm_checkpoint: bool) -> None:
        if is_marlin_format:
            self.checkpoint_format = CHECKPOINT_FORMAT.MARLIN
        elif awq_gemm_checkpoint:
            self.quant_method = QUANT_METHOD.AWQ
            self.checkpoint_format = CHECKPOINT_FORMAT.AWQ_GEMM
        self._check()
        if self.dynamic is not None:
            check_patterns(self.dynamic)
            for pattern, override in self.dynamic.items():
                try:
                    replace(self, dynamic=None, **override)
                except (ConfigError, TypeError) as error:
                    raise ConfigError(f"dynamic[{pattern!r}]: {error}") from None

    def _check(self) -> None:
        check_bits_and_groups(self.bits, self.group_size)
        for name, (allows, demand) in _NUMBERS.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not allows(value):
                raise ConfigError(f"{name} is {value!r}; it must {demand}.")
        for name in _FLAGS:
            value = getattr(self, name)
            if value not in (True, False, None):  # some tools write null
                raise ConfigError(f"{name} is {value!r}; it must be True or False.")
        formats = QUANT_METHOD_FORMAT_MAPPING.get(self.quant_method)
        if formats is None:
            raise ConfigError(
                f"quant_method is {self.quant_method!r}; "
                f"known: {sorted(QUANT_METHOD_FORMAT_MAPPING)}."
            )
        if self.checkpoint_format not in formats:
            raise ConfigError(
                f"checkpoint_format {self.checkpoint_format!r} does not go with quant_method "
                f"{self.quant_method!r}; possible: {sorted(formats)}."
            )

    @classmethod
    def preset(
        cls, name: str = "default", bits: int = 4, group_size: int = 128, **changes: Any
    ) -> BaseQuantizeConfig:
        """Give the settings that go by a name: "compatible", "default" or "best".

        :param changes: settings that differ from the preset's
        :raises ConfigError: (a ValueError) if there is no such preset
        """
        if name not in PRESETS:
            raise ConfigError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
        return cls(bits, group_size, **PRESETS[name].settings_at(bits) | changes)

    @property
    def contiguous(self) -> bool:
        """Tell whether groups are neighbours, so that ``g_idx`` says nothing new."""
        return self.group_size == -1 or self.static_groups or not self.desc_act

    def settings_for(self, name: str) -> BaseQuantizeConfig | None:
        """Give the settings of one module by its full name; None if it stays dense."""
        override = find_override(self.dynamic or {}, name)
        if override is None:
            return None
        return replace(self, dynamic=None, **override) if override else self

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as AutoGPTQ's JSON object, keys in its order.

        Settings that AutoGPTQ did not have are left out while they have their defaults.
        """
        fields = asdict(self)
        for name in _OWN_FIELDS:
            if fields[name] == type(self).__dataclass_fields__[name].default:
                del fields[name]
        at_the_end = (QUANT_METHOD_FIELD, CHECKPOINT_FORMAT_FIELD)
        return {k: v for k, v in fields.items() if k not in at_the_end} | {
            k: fields[k] for k in at_the_end
        }

    def save_pretrained(self, save_dir: str | Path, **_kwargs: Any) -> None:
        """Write ``quantize_config.json`` into an existing folder."""
        path = Path(save_dir) / QUANT_CONFIG_FILENAME
        path.write_text(json.dumps(self.to_dict(), indent=2), encoding="utf-8")

    def get_cache_file_path(
        self, quant_method: str | None = None, checkpoint_format: str | None = None
    ) -> tuple[str, bool]:
        """Give the path at which AutoGPTQ kept a converted checkpoint, and whether it is there.

        Nothing is converted ahead here: each tensor is while it is read.
        """
        method = quant_method or self.quant_method
        name = f"autogptq_model_{method}_{checkpoint_format or self.checkpoint_format}.safetensors"
        path = hub.assets_folder(self.model_name_or_path or ".") / name
        return str(path), path.is_file()

    @classmethod
    def from_quant_config(
        cls, quantize_cfg: dict[str, Any], checkpoint_format: str | None = None
    ) -> BaseQuantizeConfig:
        """Normalise a configuration as any GPTQ or AWQ tool writes it.

        :raises ConfigError: on an unknown or contradictory format or method
        """
        given = {key.lower(): value for key, value in quantize_cfg.items()}
        given = {QUANT_CONFIG_ARG_SYNONYMS.get(key, key): value for key, value in given.items()}
        settings = {k: v for k, v in given.items() if k in cls.__dataclass_fields__}
        for spelling in _OLD_SPELLINGS:
            settings.pop(spelling, None)
        settings |= _method_and_format(given, checkpoint_format)
        if settings.get("dynamic") is not None:
            settings["dynamic"] = known_settings_only(settings["dynamic"]) or None
        if settings[CHECKPOINT_FORMAT_FIELD] in ORDERLESS:
            settings["desc_act"] = False
        if settings[QUANT_METHOD_FIELD] == QUANT_METHOD.AWQ:
            _check_awq(settings)
            settings.setdefault("sym", not given.get("zero_point", True))
        if "sym" not in settings:
            logger.warning("The quantization config does not say `sym`; taking symmetric.")
        unknown = sorted(
            set(given) - set(cls.__dataclass_fields__) - _READ_BESIDES - set(_OLD_SPELLINGS)
        )
        if unknown:
            logger.info("Ignoring quantization settings that are not known here: %s", unknown)
        return cls(**settings)

    @classmethod
    def from_pretrained(cls, save_dir: str | Path, **kwargs: Any) -> BaseQuantizeConfig:
        """Read the settings of a checkpoint in a folder or on the Hub.

        :raises MissingFileError: if no file there holds a quantization configuration
        """
        checkpoint_format = kwargs.pop(CHECKPOINT_FORMAT_FIELD, None)
        for name in _CONFIG_FILES:
            path = hub.find_file(save_dir, name, **kwargs)
            if path is None:
                continue
            content: dict[str, Any] | None = _read_json(path)
            if content is not None and name == "config.json":
                content = content.get("quantization_config")
            if content is None:
                continue
            return cls.from_quant_config(content, checkpoint_format)
        raise MissingFileError(
            f"{save_dir} holds no quantization configuration: none of quantize_config.json, "
            "quant_config.json or a config.json with `quantization_config`. If it is a quantized "
            "model, pass quantize_config=BaseQuantizeConfig(...) with its settings."
        )


def check_bits_and_groups(bits: int, group_size: int) -> None:
    """Refuse what no weight can be packed with.

    :raises ConfigError: (a ValueError) naming the one of both that it is about
    """
    if not isinstance(bits, int) or bits not in (2, 3, 4, 8):
        raise ConfigError(f"bits is {bits!r}; it must be 2, 3, 4 or 8.")
    if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise ConfigError(
            f"group_size is {group_size!r}; it must be -1 (one scale per row) "
            "or a positive number of columns, usually 128."
        )


def _method_and_format(given: dict[str, Any], wanted_format: str | None) -> dict[str, str]:
    """Find out method and format from the several ways in which tools write them down."""
    method = str(given.get(QUANT_METHOD_FIELD) or QUANT_METHOD.GPTQ).lower()
    # GPTQModel has begun to call it `format`.
    checkpoint_format = given.get(CHECKPOINT_FORMAT_FIELD) or given.get("format")
    if checkpoint_format is not None and wanted_format is not None:
        raise ConfigError(
            f"The configuration says checkpoint_format {checkpoint_format!r}, so "
            f"checkpoint_format={wanted_format!r} must not be passed as well."
        )
    checkpoint_format = str(checkpoint_format or wanted_format or "").lower() or None
    if checkpoint_format is not None and checkpoint_format not in _ALL_FORMATS:
        raise ConfigError(
            f"Unknown checkpoint_format {checkpoint_format!r}; known: {sorted(_ALL_FORMATS)}."
        )
    if method == CHECKPOINT_FORMAT.MARLIN or given.get(CHECKPOINT_FORMAT_FIELD_COMPAT_MARLIN):
        method, checkpoint_format = QUANT_METHOD.GPTQ, CHECKPOINT_FORMAT.MARLIN
    elif given.get("awq_gemm_checkpoint") or _is_awq_gemm(method, given):
        method, checkpoint_format = QUANT_METHOD.AWQ, CHECKPOINT_FORMAT.AWQ_GEMM
    if method not in QUANT_METHOD_FORMAT_MAPPING:
        raise ConfigError(
            f"Unknown quant_method {method!r}; known: {sorted(QUANT_METHOD_FORMAT_MAPPING)}."
        )
    if checkpoint_format is None:
        checkpoint_format = CHECKPOINT_FORMAT.GPTQ
        logger.info("The quantization config names no checkpoint_format; taking 'gptq'.")
    return {QUANT_METHOD_FIELD: method, CHECKPOINT_FORMAT_FIELD: checkpoint_format}


def _is_awq_gemm(method: str, given: dict[str, Any]) -> bool:
    """Tell whether this is AWQ in its usual layout; without a version AWQ means that one."""
    version = str(given.get("version") or "").lower()
    is_awq = method == QUANT_METHOD.AWQ
    if version != CHECKPOINT_FORMAT.AWQ_GEMM and (
        version in _FOREIGN_VERSIONS or (is_awq and version)
    ):
        raise ConfigError(
            f"The checkpoint is in AWQ's layout {version!r}, which cannot be read; "
            f"only {CHECKPOINT_FORMAT.AWQ_GEMM!r} can. Convert it with the tool that made it."
        )
    return version == CHECKPOINT_FORMAT.AWQ_GEMM or (
        is_awq and not given.get(CHECKPOINT_FORMAT_FIELD)
    )


def _check_awq(settings: dict[str, Any]) -> None:
    if settings.get("bits", 4) != 4:
        raise ConfigError(
            f"An AWQ checkpoint has 4 bits; the configuration says {settings['bits']}."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not valid JSON ({error}). Download or write it again."
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content
