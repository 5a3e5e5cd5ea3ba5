"""The command ``auto-gptq``: each of its parts is one call of the library."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import AutoGPTQError, CheckpointError
from .quantization.presets import PRESETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status: 1 after an error that a user can mend."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        options.run(options)
    except (AutoGPTQError, OSError) as error:  # no file, no network, no right to write
        print(f"auto-gptq: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("auto-gptq", description="Quantize language models with GPTQ.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = _command(commands, "inspect", _inspect, "show what of a model would be quantized")
    _add_model(inspect, "full-precision model: a folder or a name on the Hub")
    _add_settings(inspect)

    quantize = _command(commands, "quantize", _quantize, "quantize a model and save it")
    _add_model(quantize, "full-precision model: a folder or a name on the Hub")
    quantize.add_argument("output", type=Path, help="folder to save to")
    _add_settings(quantize)
    quantize.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="default",
        help="how hard to try (default: default)",
    )
    quantize.add_argument(
        "--data", help="text to calibrate on: a .txt, .json, .jsonl or .parquet file, or a data set"
    )
    quantize.add_argument("--column", default="text", help="column of the data (default: text)")
    quantize.add_argument(
        "--rows", type=_count, default=128, help="calibration rows (default: 128)"
    )
    quantize.add_argument(
        "--length", type=_count, default=2048, help="tokens a row (default: 2048)"
    )
    quantize.add_argument("--batch-size", type=_count, default=1)
    quantize.add_argument("--work-dir", type=Path, help="keep finished blocks there, to go on")
    quantize.add_argument("--dtype", default="auto", help="dtype to load the model in")
    quantize.add_argument("--max-shard-size", help='like "4GB"')

    evaluate = _command(commands, "evaluate", _evaluate, "measure a quantized model's perplexity")
    _add_model(evaluate, "quantized model: a folder or a name on the Hub")
    evaluate.add_argument("--data", default="wikitext", help="text file or data set")
    evaluate.add_argument("--window", type=int, default=512, help="tokens a window (default: 512)")
    evaluate.add_argument("--device")

    convert = _command(commands, "convert", _convert, "save a quantized model in another format")
    _add_model(convert, "quantized model: a folder or a name on the Hub")
    convert.add_argument("output", type=Path, help="folder to save to")
    convert.add_argument("--format", choices=("gptq", "gptq_v2", "marlin"), default="gptq")
    convert.add_argument("--max-shard-size", help='like "4GB"')

    kernels = _command(commands, "kernels", _kernels, "say which kernel runs, and why no other")
    _add_settings(kernels)
    kernels.add_argument("--device", help="like cuda:0; the first GPU if there is one")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("model", help=text)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128, help="-1 for one group a row")


def _inspect(options: argparse.Namespace) -> None:
    from .modeling import load
    from .nn_modules.experts import unfuse
    from .pipeline.discover import find_or_discover
    from .pipeline.overview import overview

    config = load.load_config(options.model, options.trust_remote_code)
    model = load.skeleton(config, trust_remote_code=options.trust_remote_code)
    unfuse(model)
    row = find_or_discover(model, config.model_type)
    print(overview(model, row, _settings(options)))


def _quantize(options: argparse.Namespace) -> None:
    from .calibration.datasets import as_examples, columns, python_documentation, token_rows
    from .checkpoint.writer import Files, check_folder
    from .modeling import AutoGPTQForCausalLM
    from .quantization.config import BaseQuantizeConfig

    check_folder(options.output)  # now, and not after the work
    Files(max_shard_size=options.max_shard_size)
    tokenizer = _tokenizer(options)
    if options.data is None:
        text = python_documentation()
    else:
        text = "\n\n".join(columns(options.data, [options.column])[options.column])
    rows = token_rows(text, tokenizer, options.length)[: options.rows]
    model = AutoGPTQForCausalLM.from_pretrained(
        options.model,
        BaseQuantizeConfig.preset(options.preset, options.bits, options.group_size),
        trust_remote_code=options.trust_remote_code,
        torch_dtype=options.dtype,
    )
    model.quantize(as_examples(rows), options.batch_size, work_dir=options.work_dir)
    model.save_quantized(options.output, max_shard_size=options.max_shard_size)
    print(f"{len(model.report)} linears quantized; saved in {options.output}")


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluation.perplexity import Perplexity

    tokenizer = _tokenizer(options)
    measure = Perplexity(_load(options, device=options.device), tokenizer, options.data)
    result = measure.calculate_perplexity(options.window, options.window)
    print(f"perplexity {result[-1]:.4f} over {len(result)} windows of {options.window} tokens")


def _convert(options: argparse.Namespace) -> None:
    model = _load(options, device="cpu")
    model.save_quantized(
        options.output, checkpoint_format=options.format, max_shard_size=options.max_shard_size
    )
    print(f"saved as {options.format!r} in {options.output}")


def _kernels(options: argparse.Namespace) -> None:
    import torch

    from .kernels.choose import Weight, explain
    from .modeling.place import Place

    device = options.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    Place.of(device, None, None)  # refuses what this machine has not
    settings = _settings(options)
    print(explain(Weight(torch.device(device), settings.bits, settings.group_size)))


def _settings(options: argparse.Namespace) -> Any:
    from .quantization.config import BaseQuantizeConfig

    return BaseQuantizeConfig(options.bits, options.group_size, desc_act=False)


def _tokenizer(options: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    from .modeling import load

    load.load_config(options.model, options.trust_remote_code)  # says best if there is no model
    try:
        return AutoTokenizer.from_pretrained(
            options.model, trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{options.model} has no usable tokenizer: {error}") from error


def _load(options: argparse.Namespace, **arguments: Any) -> Any:
    from .modeling import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(
        options.model, trust_remote_code=options.trust_remote_code, **arguments
    )
