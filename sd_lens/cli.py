"""The command line: `sd-lens report`, `spare` and `signature` of a model, `sd-lens lineage` of signatures."""

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
from sd_lens.errors import InputError, SdLensError
from sd_lens.storage import written_whole

_DESCRIPTION = "Where do a language model's high-norm tokens come from?"
_EPILOG = """examples:
  sd-lens report smollm2-135m
  sd-lens report gpt2 --prepend-bos --out gpt2.html
  sd-lens report ./my-finetune --texts prose.txt --backend bridge
  sd-lens report model.Q4_1.gguf --device cuda
  sd-lens spare smollm2-135m --format bitsandbytes
  sd-lens signature smollm2-135m -o base.safetensors
  sd-lens lineage base.safetensors finetune.safetensors

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
    _add_report(commands)
    _add_spare(commands)
    _add_signature(commands)
    _add_lineage(commands)
    return parser


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="find a model's high-norm tokens, predict them from its weights, write one HTML page",
        description="Find a model's high-norm tokens, predict their direction from the weights alone, "
        "and write one self-contained HTML page.",
    )
    _add_model(report)
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
    report.add_argument(
        "--compare",
        metavar="FILE",
        nargs="+",
        default=(),
        help="signatures of other models (sd-lens signature): which of them share a base with this one",
    )
    report.set_defaults(run=_report)


def _add_spare(commands: Any) -> None:
    spare = commands.add_parser(
        "spare",
        help="name the modules that quantization should keep in high precision",
        description="Name the modules (the W_out of blocks where norms explode or decay) that quantization should keep "
        "in high precision, as a quantizer takes them.",
    )
    _add_model(spare)
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


def _add_signature(commands: Any) -> None:
    signature = commands.add_parser(
        "signature",
        help="write a model's signature, a few kilobytes, for lineage",
        description="Write the direction of a model's high-norm tokens and the singular values of its blocks "
        "to a safetensors file of a few kilobytes.",
    )
    _add_model(signature)
    signature.add_argument(
        "--texts",
        metavar="FILE",
        help="UTF-8 text to observe the direction in, passages separated by blank lines "
        "(default: forecast from the weights alone)",
    )
    signature.add_argument("-o", "--out", metavar="FILE", default="signature.safetensors", help="default: %(default)s")
    signature.set_defaults(run=_signature)


def _add_lineage(commands: Any) -> None:
    lineage = commands.add_parser(
        "lineage",
        help="say which models share a base, from their signatures",
        description="Compare signatures in pairs, and say which models share a base.",
    )
    lineage.add_argument("files", metavar="FILE", nargs="+", help="written by sd-lens signature; two or more")
    lineage.add_argument(
        "--false-positive-rate",
        metavar="RATE",
        type=float,
        default=1e-3,
        help="the probability that any unrelated pair is called related (default: %(default)s)",
    )
    lineage.set_defaults(run=_lineage)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The model, and how it is loaded and run."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="smollm2-135m (fetched once), a Hugging Face folder, a .gguf file, or a hub name",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub name")
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
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a norm; expected a number or auto") from None


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are not blocks; expected numbers such as 2,11") from None


def _report(options: argparse.Namespace) -> int:
    from sd_lens import write_report  # slow to import, and not needed for --help

    texts, compared = _texts(options), _signatures(options.compare)
    sentences = write_report(
        _model(options),
        options.out,
        texts,
        prepend_bos=options.prepend_bos,
        threshold=options.threshold,
        quantize=options.quantize,
        compare=compared,
        texts_name=options.texts,
    )
    for sentence in sentences:
        print(html.unescape(sentence))
    print(f"\nThe report is in {os.path.abspath(options.out)}")
    return 0


def _spare(options: argparse.Namespace) -> int:
    from sd_lens import find_high_norm_tokens, forecast, spare_list

    texts = _texts(options)
    model = _model(options)
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


def _signature(options: argparse.Namespace) -> int:
    from sd_lens import signature

    texts = _texts(options)
    with written_whole(options.out) as temporary:  # says at once if it cannot be written
        found = signature(_model(options), texts, prepend_bos=options.prepend_bos)
        found.save(temporary)
    print(found)
    print(f"\nThe signature is in {os.path.abspath(options.out)}")
    return 0


def _lineage(options: argparse.Namespace) -> int:
    from sd_lens import lineage

    found = lineage(_signatures(options.files), false_positive_rate=options.false_positive_rate)
    digits = {"angle": 2, "threshold": 2, "shared": 0, "required": 0, "log10_p": 1, "spectral_distance": 4}
    formatters = {column: f"{{:.{n}f}}".format for column, n in digits.items()}
    table = found.to_dataframe().astype(dict.fromkeys(digits, float))
    print(table.to_string(index=False, na_rep="-", formatters=formatters))
    print()
    print(found)
    return 0


def _signatures(files: Sequence[str]) -> dict[str, Any]:
    from sd_lens import Signature

    return {name: Signature.load(file) for name, file in _names(files).items()}


def _names(files: Sequence[str]) -> dict[str, str]:
    """Files by their names without ending, or as they were given if two names would be the same.

    Raises:
        InputError: for a file that is given twice.
    """
    places = [os.path.realpath(file) for file in files]
    for file, place in zip(files, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{file} is given twice: a model is compared with others, not with itself")
    stems = [os.path.splitext(os.path.basename(file))[0] for file in files]
    return dict(zip(stems if len(set(stems)) == len(stems) else files, files, strict=True))


def _texts(options: argparse.Namespace) -> list[str] | None:
    from sd_lens import read_texts

    return None if options.texts is None else read_texts(options.texts)


def _model(options: argparse.Namespace) -> Any:
    import torch

    from sd_lens import load_model

    return load_model(
        options.model,
        backend=options.backend,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        trust_remote_code=options.trust_remote_code,
        revision=options.revision,
    )


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
