"""Tokens per second of ``generate``, batch 1, greedy: 4-bit weights here beside fp16 elsewhere.

Beside them the tokens per second of a long prompt, the logits of its last token only.

The models have the shapes of real ones and random weights, which are as fast. Every row is made in
the same run on the same device. On a CPU: ``--model smollm2-135m --tokens 64``.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import save, table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from auto_gptq.generation.generate import generate
from auto_gptq.generation.llama import LlamaDecoder
from auto_gptq.kernels import native
from auto_gptq.nn_modules.qlinear import QuantLinear
from auto_gptq.nn_modules.surgery import find_linears, replace

MODELS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip


def build(name: str, device: torch.device, dtype: torch.dtype, bits: int | None) -> Any:
    """Make a model of random weights; dense without ``bits``."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**MODELS[name]), dtype=dtype)
    if bits is not None:
        linears = find_linears(model.model.layers)
        replace(model.model.layers, [(n, quantized(x, bits, device)) for n, x in linears.items()])
    for module in model.modules():
        for child, parameter in list(module.named_parameters(recurse=False)):
            filled = torch.empty(parameter.shape, device=device, dtype=dtype)
            filled = filled.fill_(1) if filled.dim() == 1 else filled.normal_(std=0.02)
            setattr(module, child, nn.Parameter(filled, requires_grad=False))
    model.tie_weights()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def quantized(linear: Any, bits: int, device: torch.device) -> QuantLinear:
    """Make a layer of random integers whose weights are about as large as usual."""
    with torch.device(device):
        layer = QuantLinear(bits, 128, linear.in_features, linear.out_features, bias=False)
        words = torch.randint(-(2**31), 2**31, layer.qweight.shape, dtype=torch.int32)
    middle = (1 << (bits - 1)) - 1  # format "gptq" keeps a zero point less one
    packed = sum(middle << (bits * i) for i in range(32 // bits)) if 32 % bits == 0 else 0
    layer.qweight.copy_(words)
    layer.qzeros.fill_(packed - (1 << 32) if packed >= 1 << 31 else packed)
    layer.scales.fill_(0.02 * 4 / (1 << bits))
    layer.prepare()
    return layer


def per_second(work: Callable[[int], torch.Tensor], tokens: int, repeats: int) -> float:
    """Give the median of new tokens per second of calls after a short one that does not count."""
    speeds = []
    work(min(tokens, 8))
    for _ in range(repeats):
        _wait()
        started = time.perf_counter()
        made = work(tokens)
        _wait()
        speeds.append(tokens / (time.perf_counter() - started))
        assert made.shape[1] == PROMPT + tokens, made.shape
    return statistics.median(speeds)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def prompt_per_second(model: Any, tokens: int, repeats: int, device: torch.device) -> float:
    """Give the median of prompt tokens per second, after a prompt that does not count."""
    prompt = torch.randint(3, 500, (1, tokens), device=device)
    speeds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            _wait()
            started = time.perf_counter()
            model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            _wait()
            speeds.append(tokens / (time.perf_counter() - started))
    return statistics.median(speeds[1:])


PROMPT = 16
LONG_PROMPT = 512


def rows(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure one way of generating after the other."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    ours = f"{options.bits} bits"
    few = min(options.tokens, 16)  # transformers' own loop is slow, and as slow at each token

    def row(weights: str, loop: str, work: Any, tokens: int, **asked: Any) -> dict[str, Any]:
        batch, repeats = (
            asked.pop("batch", 1),
            3 if weights == ours and loop != "transformers" else 1,
        )
        prompt = torch.randint(3, 500, (batch, PROMPT), device=device)
        asked = {"input_ids": prompt, "do_sample": False} | asked
        speed = batch * per_second(lambda n: work(**asked, max_new_tokens=n), tokens, repeats)
        return {
            "weights": weights, "loop": loop, "batch": batch, "new tokens": tokens,
            "runs": repeats, "tokens/s": speed,
        }  # fmt: skip

    def prompt_row(weights: str) -> dict[str, Any]:
        speed = prompt_per_second(model, LONG_PROMPT, 3, device)
        return {
            "weights": weights, "loop": f"prompt of {LONG_PROMPT} tokens", "batch": 1,
            "new tokens": 0, "runs": 3, "tokens/s": speed,
        }  # fmt: skip

    model = build(options.model, device, dtype, options.bits)

    def here(**asked: Any) -> torch.Tensor:
        return generate(model, **asked)

    yield row(ours, "auto_gptq", here, options.tokens)
    sampled = {"do_sample": True, "top_k": 50, "top_p": 0.9, "temperature": 0.8}
    yield row(ours, "auto_gptq, sampled", here, options.tokens, **sampled)
    yield row(ours, "auto_gptq", here, options.tokens, batch=8)
    yield row(ours, "transformers", model.generate, few)
    yield prompt_row(ours)
    if device.type == "cpu":
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.int8_activations = True
        yield prompt_row(f"{ours}, int8 activations")
        yield row(f"{ours}, int8 activations", "auto_gptq", here, options.tokens)
    if device.type == "cuda":
        options.parts = parts(model, PROMPT + options.tokens // 2)
    del model
    gc.collect()
    if not options.no_dense:
        name = "fp16" if device.type == "cuda" else "fp32"
        model = build(options.model, device, dtype, None)
        yield row(name, "transformers", model.generate, few)
        yield row(name, "auto_gptq", here, options.tokens)
        yield prompt_row(name)
        if options.compiled:
            static = {"cache_implementation": "static"}
            yield row(name, "transformers, compiled", model.generate, options.tokens, **static)


def parts(model: Any, length: int) -> dict[str, float]:
    """Give the microseconds of the parts of a step on the GPU, each as a graph of its own.

    :param length: tokens in the cache
    """
    with torch.inference_mode():
        decoder = LlamaDecoder(model)
        decoder.reserve(1, 1024)
        start = torch.zeros(1, dtype=torch.long, device="cuda")
        decoder.prefill(torch.full((1, length), 7, device="cuda"), start)
        tokens, blocks = torch.full((1,), 7, device="cuda"), decoder._blocks
        hidden = torch.zeros(1, model.config.hidden_size, device="cuda", dtype=torch.float16)
        inner = torch.zeros(1, model.config.intermediate_size, device="cuda", dtype=torch.float16)

        def products() -> None:
            for block in blocks:
                block.qkv(hidden)
                block.attention_out(hidden)
                block.gate_up(hidden)
                block.down(inner)

        works: dict[str, Callable[[], Any]] = {
            "whole step": lambda: decoder.step(tokens),
            "products of the blocks": products,
            "head": lambda: decoder._head(hidden),
        }
        return {name: graph_time(work) for name, work in works.items()}


def graph_time(work: Callable[[], Any]) -> float:
    """Give the median microseconds of a captured graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=MODELS, default="llama-2-7b")
    arguments.add_argument("--bits", type=int, default=4)
    arguments.add_argument("--tokens", type=int, default=512)
    arguments.add_argument("--no-dense", action="store_true", help="leave out fp16")
    arguments.add_argument("--compiled", action="store_true", help="fp16 with static cache as well")
    arguments.add_argument("--results", type=Path)
    options = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    print(native.reason())
    options.parts = {}
    found: list[dict[str, Any]] = []
    content = {"model": options.model, "prompt tokens": PROMPT, "rows": found}
    for row in rows(options, device):
        found.append(row)
        print(row, flush=True)
        content["microseconds of a step"] = options.parts
        # After each row, so that what was measured stays if time runs out.
        path = save(f"decode-{device.type}-{options.model}", content, options.results)
    print(table(found), options.parts, path, sep="\n")


if __name__ == "__main__":
    main()
