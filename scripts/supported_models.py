"""Try a tiny model of every type that transformers has, and write the page of supported models.

Each is built at random from its shrunk configuration, quantized to 4 bits, saved, loaded by
``AutoGPTQForCausalLM.from_quantized`` and by transformers, and its logits compared with those of
its dequantized twin; what is not quantized has to come back in every bit. What is found goes into
``benchmarks/results/supported_models.json``, so that single types can be tried anew; the page is
made of that. All take about fifteen minutes on one core.

    python scripts/supported_models.py [--senses] [--write] [TYPE ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.zoo import SENSES, TEXT, round_trip  # noqa: E402 (the path has to be set before)

PAGE = ROOT / "docs" / "reference" / "supported-models.md"
RESULTS = ROOT / "benchmarks" / "results" / "supported_models.json"
_TIMM = "its vision tower needs the library timm"
_IMAGE = "each of its inputs needs an image in a form of its own"
# Why a type is not even tried.
NOT_TRIED = {
    TEXT: {
        "gemma3n": f"{_TIMM}; its text model is `gemma3n_text`",
        "gemma4_assistant": "drafts for another model, whose keys and values it reads",
        "gemma4_unified_assistant": "drafts for another model, whose keys and values it reads",
        "musicgen": "`AutoModelForCausalLM` cannot build it from its own configuration",
        "musicgen_melody": "`AutoModelForCausalLM` cannot build it from its own configuration",
        "reformer": "its blocks hand on two streams, and only by name",
    },
    SENSES: {
        **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), _TIMM),
        **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo", "idefics"), _IMAGE),
        **dict.fromkeys(("kosmos-2", "pix2struct", "udop", "vision-encoder-decoder"), _IMAGE),
        "diffusion_gemma": "fills blocks of tokens in, not one after another",
        "evolla": "`AutoModelForMultimodalLM` cannot build it from its own configuration",
        "granite4_vision": "its projectors have sizes that the shrinking does not know",
        "inkling_mm_model": "needs the library scipy; `inkling_text` is its text model",
        "kyutai_speech_to_text": "its codec has sizes that the shrinking does not know",
        "nemo_speechlm": "transformers itself builds another one from the configuration it saved",
        "pi0": "moves robots",
        "qwen2_5_omni": "has no forward; what makes text is `qwen2_5_omni_thinker`",
        "qwen2_5_omni_thinker": "its configuration lacks sizes that the shrinking does not know",
        "qwen3_omni_moe": "has no forward; what makes text is `qwen3_omni_moe_thinker`",
        "shieldgemma2": "judges images; the model inside is `gemma3`",
        "t5gemma2": "too large: its configuration cannot be shrunk",
        "vibevoice_asr": "too large: its configuration cannot be shrunk",
        "voxtral_realtime": "each of its inputs needs sound",
    },
}


def main() -> int:
    """Try the types, keep and print what comes of them, and write the page."""
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--senses", action="store_true", help="the types that see or hear")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    auto = SENSES if options.senses else TEXT
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"transformers": transformers.__version__, "torch": torch.__version__}
    for model_type in options.types or all_types(auto):
        if model_type in NOT_TRIED[auto]:
            continue
        results.setdefault(auto, {})[model_type] = found = tried(model_type, auto)
        print(model_type, found, flush=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if options.write:
        PAGE.write_text(page(results), encoding="utf-8")
    return 0


def all_types(auto: str) -> list[str]:
    """Give the types that one of transformers' automatic classes builds."""
    from transformers.models.auto import modeling_auto

    kind = {TEXT: "CAUSAL_LM", SENSES: "MULTIMODAL_LM"}[auto]
    return sorted(getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES"))


def tried(model_type: str, auto: str) -> dict[str, Any]:
    """Give what came of one type: the trip's figures, or ``failure``."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            trip = round_trip(model_type, Path(folder), by_transformers=True, auto=auto)
        except Exception as error:  # whatever it is goes into the table
            return {"failure": f"{type(error).__name__}: {error}".split("\n", 1)[0]}
    if not trip.is_good(trip.by_us):
        return {"failure": f"logits differ by {trip.by_us:.1e} of the largest"}
    kinds = (name.removeprefix(f"{trip.blocks}.").partition(".")[2] for name in trip.dense)
    good = trip.is_good(trip.by_transformers)
    return asdict(trip) | {"dense": list(dict.fromkeys(kinds)), "good": good}


def page(results: dict[str, Any]) -> str:
    """Write the page."""
    from auto_gptq.architectures.find import model_types

    lines = [
        "# Supported models",
        "",
        "<!-- Written by scripts/supported_models.py. -->",
        "",
        "A model is quantized if it has a list of repeated blocks with linear layers in them. Its "
        "blocks, their linears, the order in which these run and which of them read the same input "
        "are found by running one block on a few tokens; nothing has to be known about it. "
        "`auto-gptq inspect MODEL` shows what is found. So do models that bring their own code "
        "(`trust_remote_code=True`); the code is saved along with the checkpoint. A model with a "
        "row in `auto_gptq/architectures/table.py` is not looked at first, if the row suits it; "
        "these types have one:",
        "",
        ", ".join(f"`{name}`" for name in sorted(model_types())) + ".",
        "",
        f"With transformers {results['transformers']} and torch {results['torch']}, on the CPU, "
        "the script took a random model of two or so blocks made from each type's own "
        "configuration, every size in it made small, and quantized it to 4 bits with groups of 32.",
        "",
        "*Linears* counts what was packed, *experts* those of them in mixtures of experts. *Dense* "
        "are linears inside the blocks that stay as they are: routers, what does not run on text "
        "alone, and shapes that are no multiples of 32, of which a tiny model has more than a real "
        "one.",
        "",
        "## Models of text",
        "",
        *_table(results, TEXT),
        "## Models that see or hear",
        "",
        "Of these the part that makes text is quantized; all else comes back in every bit. *Image* "
        "says whether an image was among what the tiny model was calibrated and compared on; the "
        "others were given text alone, because their processors do more than the script can.",
        "",
        *_table(results, SENSES),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(results: dict[str, Any], auto: str) -> list[str]:
    found, not_tried = results[auto], NOT_TRIED[auto]
    trips = {name: row for name, row in sorted(found.items()) if "failure" not in row}
    both = sum(row["good"] for row in trips.values())
    image = ("image",) if auto == SENSES else ()
    lines = [
        f"Of the {len(found.keys() | not_tried.keys())} types of `{auto}`, {len(trips)} come back "
        f"through `from_quantized` with the logits of their dequantized twins, {both} of them "
        "through transformers as well.",
        "",
        *_header("type", "blocks", "linears", "experts", *image, "dense", "loaded by transformers"),
    ]
    for name, row in trips.items():
        theirs = row["by_transformers"]
        if isinstance(theirs, float):
            theirs = "yes" if row["good"] else f"logits differ by {theirs:.0e}"
        seen = ("yes" if row["sighted"] else "",) if image else ()
        cells = (name, f"`{row['blocks']}`", row["quantized"], row["experts"] or "", *seen)
        lines.append(_row(*cells, ", ".join(row["dense"]), _shortened(str(theirs))))
    reasons = not_tried | {n: row["failure"] for n, row in found.items() if "failure" in row}
    lines += ["", "Not tried, or failed:", "", *_header("type", "reason")]
    return [*lines, *(_row(n, _shortened(reason)) for n, reason in sorted(reasons.items())), ""]


def _header(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _shortened(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if len(text) < 120 else f"{text[:117]}..."


if __name__ == "__main__":
    raise SystemExit(main())
