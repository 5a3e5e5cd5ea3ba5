"""Try a tiny model of every type that transformers has, and write the page of supported models.

Each is built at random from its shrunk configuration, quantized to 4 bits, saved, loaded by
``AutoGPTQForCausalLM.from_quantized`` and by transformers, and its logits compared with those of
its dequantized twin. Takes about ten minutes on one core.

    python scripts/supported_models.py [--write] [TYPE ...]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.zoo import Trip, round_trip  # noqa: E402 (the path has to be set before)

PAGE = ROOT / "docs" / "reference" / "supported-models.md"
# Largest difference of logits, as a share of the largest one: CPU kernels round activations to 15
# bits, by 3e-5 of the largest each.
MOST = 5e-4
# Why a type is not even tried.
NOT_TRIED = {
    "blt": "its parts have configurations of their own, which the shrinking does not know",
    "dots3_note": "its configuration overrides sizes layer by layer, which cannot be shrunk",
    "dots3_note_text": "its configuration overrides sizes layer by layer, which cannot be shrunk",
    "gemma3n": "its vision tower needs the library timm; its text model is `gemma3n_text`",
    "gemma4_assistant": "drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it reads",
    "musicgen": "`AutoModelForCausalLM` cannot build it from its own configuration",
    "musicgen_melody": "`AutoModelForCausalLM` cannot build it from its own configuration",
    "reformer": "its blocks hand on two streams, and only by name",
}


def main() -> int:
    """Try the types, print what comes of them, and write the page."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    types = options.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    trips: dict[str, Trip] = {}
    failures: dict[str, str] = {}
    for model_type in types:
        if model_type in NOT_TRIED:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                trip = round_trip(model_type, Path(folder), by_transformers=True)
            except Exception as error:
                failures[model_type] = f"{type(error).__name__}: {error}".split("\n", 1)[0]
                print(model_type, failures[model_type], flush=True)
                continue
        if trip.by_us > MOST:
            failures[model_type] = f"logits differ by {trip.by_us:.1e} of the largest"
        else:
            trips[model_type] = trip
        print(model_type, trip.by_us, trip.by_transformers, trip.quantized, flush=True)
    print(summary(types, trips))
    if options.write:
        PAGE.write_text(page(types, trips, failures), encoding="utf-8")
    return 0


def summary(types: Iterable[str], trips: dict[str, Trip]) -> str:
    """Count in a sentence."""
    both = sum(is_good(trip.by_transformers) for trip in trips.values())
    return (
        f"Of {len(list(types))} types, {len(trips)} come back through `from_quantized` with the "
        f"logits of their dequantized twins, {both} of them through transformers as well."
    )


def is_good(difference: float | str | None) -> bool:
    """Tell whether a difference is one of rounding."""
    return isinstance(difference, float) and difference <= MOST


def page(types: list[str], trips: dict[str, Trip], failures: dict[str, str]) -> str:
    """Write the page."""
    import torch
    import transformers

    from auto_gptq.architectures.find import model_types

    lines = [
        "# Supported models",
        "",
        "<!-- Written by scripts/supported_models.py. -->",
        "",
        "A model is quantized if it has a list of repeated blocks with linear layers in them. Its "
        "blocks, their linears, the order in which these run and which of them read the same input "
        "are found by running one block on a few tokens; nothing has to be known about it. "
        "`auto-gptq inspect MODEL` shows what is found. A model with a row in "
        "`auto_gptq/architectures/table.py` is not looked at first; these types have one:",
        "",
        ", ".join(f"`{name}`" for name in sorted(model_types())) + ".",
        "",
        "## Tried",
        "",
        summary(types, trips),
        f"With transformers {transformers.__version__} and torch {torch.__version__}, "
        "on the CPU: a random model of two or so blocks made from the type's own configuration, "
        "every size in it made small, quantized to 4 bits with groups of 32.",
        "",
        "*Linears* counts what was packed, *experts* those of them in mixtures of experts. *Dense* "
        "are linears inside the blocks that stay as they are: routers, what does not run on text "
        "alone, and shapes that are no multiples of 32, of which a tiny model has more than a real "
        "one.",
        "",
        "| type | blocks | linears | experts | dense | loaded by transformers |",
        "|---|---|---|---|---|---|",
    ]
    for name, trip in trips.items():
        theirs = "yes" if is_good(trip.by_transformers) else _shortened(str(trip.by_transformers))
        if isinstance(trip.by_transformers, float) and not is_good(trip.by_transformers):
            theirs = f"logits differ by {trip.by_transformers:.0e}"
        kinds = ", ".join(
            dict.fromkeys(x.removeprefix(f"{trip.blocks}.").partition(".")[2] for x in trip.dense)
        )
        cells = (name, f"`{trip.blocks}`", trip.quantized, trip.experts or "", kinds, theirs)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "## Not tried, or failed", "", "| type | reason |", "|---|---|"]
    reasons = {name: NOT_TRIED[name] for name in types if name in NOT_TRIED} | failures
    lines += [f"| {name} | {_shortened(reason)} |" for name, reason in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def _shortened(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if len(text) < 120 else f"{text[:117]}..."


if __name__ == "__main__":
    raise SystemExit(main())
