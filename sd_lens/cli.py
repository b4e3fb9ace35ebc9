"""The command line: `sd-lens report MODEL` and `sd-lens spare MODEL`."""

from __future__ import annotations

import argparse
import html
import json
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from sd_lens.applications.spare_list import FORMATS
from sd_lens.errors import SdLensError

_DESCRIPTION = "Where do a language model's high-norm tokens come from?"
_EPILOG = """examples:
  sd-lens report smollm2-135m
  sd-lens report gpt2 --prepend-bos --out gpt2.html
  sd-lens report ./my-finetune --texts prose.txt --backend bridge
  sd-lens report model.Q4_1.gguf --device cuda
  sd-lens spare smollm2-135m --format bitsandbytes

exit codes: 0 done, 1 something could not be done (one sentence says what), 2 wrong usage"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = _show_warning
    try:
        return int(options.run(options))
    except SdLensError as error:
        print(f"sd-lens: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sd-lens: interrupted; nothing was written", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="sd-lens", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=formatter
    )
    parser.add_argument("--version", action="version", version=f"sd-lens {version('sd_lens')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    report = commands.add_parser(
        "report",
        help="find a model's high-norm tokens, predict them from its weights, write one HTML page",
        description="Find a model's high-norm tokens, predict their direction from the weights alone, "
        "and write one self-contained HTML page.",
    )
    _add_model_options(report)
    report.add_argument("--texts", metavar="FILE", help="UTF-8 text, passages separated by blank lines (default: ours)")
    report.add_argument("--out", metavar="FILE", default="report.html", help="default: %(default)s")
    report.add_argument(
        "--threshold", metavar="NORM", type=_threshold, default="auto", help="a norm, or auto (default)"
    )
    report.add_argument(
        "--quantize",
        action="store_true",
        help="also measure what 8-bit quantization costs, and what sparing W_out buys",
    )
    report.set_defaults(run=_report)
    spare = commands.add_parser(
        "spare",
        help="name the modules that quantization should keep in high precision",
        description="Name the modules (the W_out of blocks where norms explode or decay) that quantization should keep "
        "in high precision, as a quantizer takes them.",
    )
    _add_model_options(spare)
    spare.add_argument(
        "--format",
        choices=("names", *FORMATS),
        default="names",
        help="names, one a line (default), or the argument of a quantizer as JSON",
    )
    which = spare.add_mutually_exclusive_group()
    which.add_argument(
        "--layers", metavar="L,L,...", type=_layers, help="blocks, 0-based (default: by the weights alone)"
    )
    which.add_argument("--texts", metavar="FILE", help="blocks where norms explode or decay in these texts")
    spare.set_defaults(run=_spare)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="smollm2-135m (fetched once), a Hugging Face folder, a .gguf file, or a hub name",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument(
        "--backend",
        choices=("auto", "hooked_transformer", "bridge"),
        default="auto",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s"
    )
    parser.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="put a beginning-of-sequence token in front of each text (default: the tokenizer's habit)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _threshold(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _loaded(options: argparse.Namespace) -> Any:
    import torch  # slow to import, and not needed for --help

    from sd_lens import load_model

    return load_model(
        options.model,
        backend=options.backend,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        trust_remote_code=options.trust_remote_code,
    )


def _report(options: argparse.Namespace) -> int:
    from sd_lens import read_texts, write_report

    texts = None if options.texts is None else read_texts(options.texts)
    model = _loaded(options)
    sentences = write_report(
        model,
        options.out,
        texts,
        prepend_bos=options.prepend_bos,
        threshold=options.threshold,
        quantize=options.quantize,
        texts_name=options.texts,
    )
    for sentence in sentences:
        print(html.unescape(sentence))
    print(f"\nThe report is in {os.path.abspath(options.out)}")
    return 0


def _spare(options: argparse.Namespace) -> int:
    from sd_lens import find_high_norm_tokens, forecast, read_texts, spare_list

    texts = None if options.texts is None else read_texts(options.texts)
    model = _loaded(options)
    if options.layers is not None:
        found = options.layers
    elif texts is not None:
        found = find_high_norm_tokens(model, texts, prepend_bos=options.prepend_bos)
    else:
        found = forecast(model)
    spared = spare_list(model, found)
    if options.layers is None:
        print(f"note: {found}", file=sys.stderr)
    print(
        "\n".join(spared.modules)
        if options.format == "names"
        else json.dumps(spared.arguments(options.format), indent=2)
    )
    return 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
