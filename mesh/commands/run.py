"""`mesh run`: generation in one process."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from mesh.commands.progress import progress_bar
from mesh.commands.sources import MODEL_HELP, model_directory
from mesh.errors import BadRequest, ModelNotFound
from mesh.protocol.sampling import SamplingFields, SamplingParams
from mesh.settings.units import format_seconds, parse_bytes

if TYPE_CHECKING:
    from mesh.model.tokenizer import Tokenizer

__all__ = ["add_generation_arguments", "add_parser", "add_sampling_arguments", "prompt_ids", "run_command", "sampling_of"]

_DESCRIPTION = """\
Generate in one process, through as many stages as asked for: the reference that a mesh is measured against.
If the model has a chat template, the prompt is given as a user's message; with --raw it is given as it is."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("run", help="generate in one process, without a mesh", description=_DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", type=Path, help=MODEL_HELP)
    add_generation_arguments(parser)
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="number of stages that the layers are cut into (default 1)")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="positions to make room for (default: prompt + max-tokens)")
    parser.add_argument("--memory", metavar="SIZE", help="refuse to load a stage that needs more, such as 8GB")
    parser.set_defaults(run=run_command)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `mesh run` and `mesh generate` share."""
    parser.add_argument("prompt", nargs="?", help="text; - reads standard input")
    parser.add_argument("--tokens", metavar="5,17,33", help="raw token ids instead of a prompt")
    parser.add_argument("--raw", action="store_true", help="no chat template")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="most tokens to generate (default 128)")
    add_sampling_arguments(parser, seed=0)
    parser.add_argument("--ignore-eos", action="store_true", help="continue after an end token")
    parser.add_argument("--json", action="store_true", help="print one object {tokens, text, usage, timing} and nothing else")


def add_sampling_arguments(parser: argparse.ArgumentParser, *names: str, **defaults: float) -> None:
    """A flag for each of the sampling parameters `names`, or for every one. `defaults` go before those of the parameters."""
    for name in names or SamplingFields.model_fields:
        field = SamplingFields.model_fields[name]
        kind, metavar = (float, "X") if field.annotation is float else (int, "N")
        default = defaults.get(name, field.default)
        text = str(field.description) if default is None else f"{field.description} (default {default:g})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, metavar=metavar, help=text)


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters among parsed arguments."""
    return {name: getattr(args, name) for name in SamplingFields.model_fields if hasattr(args, name)}


def run_command(args: argparse.Namespace) -> int:
    from mesh.kernels.library import kernels
    from mesh.model.manifest import Manifest
    from mesh.model.tokenizer import Tokenizer
    from mesh.runtime.device import prepare
    from mesh.runtime.generate import Generation, Pipeline, check_request

    prepare()
    args.model = model_directory(args.model)
    manifest = Manifest.load(args.model)
    tokenizer = Tokenizer.load(args.model) if manifest.tokenizer is not None else None
    params = SamplingParams(**sampling_of(args))
    prompt = prompt_ids(args, tokenizer, str(args.model))
    check_request(prompt, args.max_tokens, vocab_size=manifest.vocab_size, context=manifest.context_length)
    context = args.context or min(manifest.context_length, len(prompt) + args.max_tokens)
    check_request(prompt, args.max_tokens, vocab_size=manifest.vocab_size, context=context)
    began = time.perf_counter()
    with progress_bar(quiet=args.json) as progress:
        pipeline = Pipeline.load(
            args.model,
            shards=args.shards,
            context=context,
            max_memory_bytes=None if args.memory is None else parse_bytes(args.memory),
            progress=progress,
        )
        pipeline.compile_for(len(prompt), args.max_tokens, progress)
    load_s = time.perf_counter() - began
    stop = () if args.ignore_eos or tokenizer is None else tokenizer.info.eos_ids
    text = tokenizer.stream() if tokenizer is not None else None
    pieces = []
    generation = Generation()
    for token in pipeline.generate(prompt, params, max_tokens=args.max_tokens, stop_ids=stop, into=generation):
        piece = text.push(token.id) if text is not None else f"{token.id} "
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)
    if text is not None:
        pieces.append(text.finish())
        if not args.json:
            print(pieces[-1], end="")
    median = statistics.median(generation.step_s) if generation.step_s else 0.0
    if args.json:
        answer: dict[str, Any] = {
            "tokens": generation.ids,
            "text": "".join(pieces) if text is not None else None,
            "finish_reason": generation.finish_reason,
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(generation.tokens),
                "total_tokens": len(prompt) + len(generation.tokens),
            },
            "timing": {
                "load_s": load_s,
                "prefill_s": generation.prefill_s,
                "decode_s": sum(generation.step_s),
                "decode_step_s": median,
                "tokens_per_s": 1 / median if median else None,
            },
        }
        if args.logprobs is not None:
            answer["logprobs"] = [
                {"token": token.id, "logprob": token.logprob, "top": [{"token": i, "logprob": p} for i, p in token.top]}
                for token in generation.tokens
            ]
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        return 0
    print()
    rate = f", {1 / median:.1f} tokens/s (median step {format_seconds(median)})" if median else ""
    print(
        f"{len(prompt)} prompt tokens in {format_seconds(generation.prefill_s)}, {len(generation.tokens)} generated{rate}, "
        f"{args.shards} stage{'s' if args.shards > 1 else ''}, ready after {format_seconds(load_s)}, kernels: {kernels()}",
        file=sys.stderr,
    )
    return 0


def prompt_ids(args: argparse.Namespace, tokenizer: Tokenizer | None, model: str) -> Sequence[int]:
    """The token ids of the user's prompt. BadRequest or ModelNotFound say what to give instead."""
    if (args.tokens is None) == (args.prompt is None):
        raise BadRequest('give either a prompt, such as "What is rain?", or --tokens 5,17,33', field="prompt")
    if args.tokens is not None:
        try:
            return [int(part) for part in args.tokens.split(",") if part.strip()]
        except ValueError:
            raise BadRequest(f"--tokens {args.tokens} is no list of token ids: give numbers such as 5,17,33", field="tokens") from None
    from mesh.model.chat_prompt import ChatPrompts

    if tokenizer is None:
        raise ModelNotFound(f"{model} has no tokenizer: give token ids with --tokens 5,17,33")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if tokenizer.has_chat_template and not args.raw:
        return ChatPrompts(tokenizer).encode([{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt)
