"""The model card of a quantized model: facts in, Markdown out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..quantization.config import BaseQuantizeConfig

# Stands in every card written here, so that the next push may replace it, and no other one.
MARK = "<!-- written by auto-gptq; remove this line to keep your changes -->"


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the settings; what is not known is left out."""

    repo_id: str
    base_model: str | None = None  # a Hub id
    calibration_rows: int = 0
    calibration_tokens: int = 0
    perplexity: Mapping[str, float] = field(default_factory=dict)  # by name of the text


def model_card(config: BaseQuantizeConfig, facts: CardFacts) -> str:
    """Write the ``README.md`` of a repository."""
    sections = [
        _front_matter(config, facts),
        MARK,
        f"# {facts.repo_id.rpartition('/')[2]}",
        _introduction(config, facts),
        _table(config, facts),
        _loading(config, facts.repo_id),
    ]
    return "\n\n".join(sections) + "\n"


def servable(config: BaseQuantizeConfig) -> bool:
    """Tell whether vLLM and SGLang can run the checkpoint."""
    return (
        config.bits in (4, 8)
        and config.sym
        and config.group_size in (-1, 32, 64, 128)
        and (not config.desc_act or config.static_groups or config.group_size == -1)
        and config.checkpoint_format != "marlin"
    )


def _front_matter(config: BaseQuantizeConfig, facts: CardFacts) -> str:
    lines = ["---"]
    if facts.base_model:
        lines += [f"base_model: {facts.base_model}", "base_model_relation: quantized"]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    tags = ("gptq", "auto-gptq", "quantized", f"{config.bits}-bit")
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---"])


def _introduction(config: BaseQuantizeConfig, facts: CardFacts) -> str:
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    return (
        f"{base if facts.base_model else 'A language model'}, quantized to {config.bits} bits with "
        "[GPTQ](https://arxiv.org/abs/2210.17323) by auto-gptq."
    )


def _table(config: BaseQuantizeConfig, facts: CardFacts) -> str:
    whole = "one group per output row"
    facts_by_name: dict[str, str] = {
        "bits": str(config.bits),
        "group size": whole if config.group_size == -1 else str(config.group_size),
        "zero point": "symmetric" if config.sym else "asymmetric",
        "format": config.checkpoint_format,
    }
    if config.desc_act:
        groups = ", static groups" if config.static_groups else ""
        facts_by_name["column order"] = f"by activation size{groups}"
    if config.lm_head:
        facts_by_name["output head"] = "quantized"
    if config.dynamic:
        patterns = ", ".join(f"`{pattern}`" for pattern in config.dynamic)
        facts_by_name["settings of their own"] = patterns.replace("|", "\\|")
    if facts.calibration_tokens:
        facts_by_name["calibration"] = (
            f"{facts.calibration_rows:,} rows, {facts.calibration_tokens:,} tokens"
        )
    for text, value in facts.perplexity.items():
        facts_by_name[f"perplexity, {text}"] = f"{value:.3f}"
    rows = [f"| {name} | {value} |" for name, value in facts_by_name.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _loading(config: BaseQuantizeConfig, repo_id: str) -> str:
    parts = [
        "## How to run it",
        "With auto-gptq:",
        _code(
            "python",
            "from auto_gptq import AutoGPTQForCausalLM",
            "",
            f'model = AutoGPTQForCausalLM.from_quantized("{repo_id}")',
        ),
        "With transformers (and auto-gptq installed):",
        _code(
            "python",
            "import auto_gptq",
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{repo_id}", device_map="auto")',
        ),
    ]
    if servable(config):
        parts += ["With vLLM:", _code("sh", f"vllm serve {repo_id}")]
    else:
        parts.append(
            "vLLM does not run these settings: it wants 4 or 8 bits, symmetric, and with groups "
            "`desc_act: false`."
        )
    return "\n\n".join(parts)


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
