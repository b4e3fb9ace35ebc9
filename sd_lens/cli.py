"""The command line: `sd-lens report MODEL`."""

from __future__ import annotations

import argparse
import html
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version

from sd_lens.errors import SdLensError

_DESCRIPTION = "Where do a language model's high-norm tokens come from?"
_EPILOG = """examples:
  sd-lens report smollm2-135m
  sd-lens report gpt2 --prepend-bos --out gpt2.html
  sd-lens report ./my-finetune --texts prose.txt --backend bridge
  sd-lens report model.Q4_1.gguf --device cuda

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
    report.add_argument(
        "model",
        metavar="MODEL",
        help="smollm2-135m (fetched once), a Hugging Face folder, a .gguf file, or a hub name",
    )
    report.add_argument("--texts", metavar="FILE", help="UTF-8 text, passages separated by blank lines (default: ours)")
    report.add_argument("--out", metavar="FILE", default="report.html", help="default: %(default)s")
    report.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    report.add_argument(
        "--backend",
        choices=("auto", "hooked_transformer", "bridge"),
        default="auto",
        help="default: %(default)s",
    )
    report.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s"
    )
    report.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="put a beginning-of-sequence token in front of each text (default: the tokenizer's habit)",
    )
    report.add_argument(
        "--threshold", metavar="NORM", type=_threshold, default="auto", help="a norm, or auto (default)"
    )
    report.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    report.set_defaults(run=_report)
    return parser


def _threshold(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _report(options: argparse.Namespace) -> int:
    import torch  # slow to import, and not needed for --help

    from sd_lens import load_model, read_texts, write_report

    texts = None if options.texts is None else read_texts(options.texts)
    model = load_model(
        options.model,
        backend=options.backend,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        trust_remote_code=options.trust_remote_code,
    )
    sentences = write_report(
        model,
        options.out,
        texts,
        prepend_bos=options.prepend_bos,
        threshold=options.threshold,
        texts_name=options.texts,
    )
    for sentence in sentences:
        print(html.unescape(sentence))
    print(f"\nThe report is in {os.path.abspath(options.out)}")
    return 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
