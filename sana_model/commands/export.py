"""`sana export onnx|check|tensorrt`: a model as ONNX graphs, verified, and as TensorRT engines."""

import argparse

ONNX = """\
Write text encoder, transformer, decoder and encoder of a model as ONNX graphs: DIR/transformer.onnx and so on, weights
beside them, with configuration and tokenizer, so that `--model DIR --backend onnxruntime` paints from DIR alone. Batch,
height, width and text length are dynamic; the profile is for engines. DIR is written when all of it is there."""

CHECK = """\
Run every graph of DIR in ONNX Runtime and its network in PyTorch: three shapes, zeros, and outliers; then paint a picture
with both. Graphs in 16 bits are checked as a twin that computes in fp32 and rounds after every operator."""

TENSORRT = """\
Build TensorRT engines from the graphs in DIR, for the GPUs of a target: ENGINES/transformer-<hash>.engine and so on, with
what is known of each in a .json beside it, and all else that `--model ENGINES --backend tensorrt` paints from. What is
there already is not built again. The package tensorrt-rtx needs no GPU; tensorrt builds for the one that is here."""


def add_parser(commands) -> None:
    """The subcommands of `sana export`, for the command line in `sana_model.cli`."""
    export = commands.add_parser("export", help="ONNX graphs and TensorRT engines of a model")
    kinds = export.add_subparsers(metavar="WHAT", required=True)
    _add_onnx(kinds.add_parser("onnx", help="write ONNX graphs", description=ONNX))
    _add_check(kinds.add_parser("check", help="compare ONNX graphs with PyTorch", description=CHECK))
    _add_tensorrt(kinds.add_parser("tensorrt", help="build TensorRT engines", description=TENSORRT))


def _add_onnx(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_onnx)
    parser.add_argument("model", metavar="MODEL", help="as for `sana generate --model`")
    parser.add_argument("-o", "--output", required=True, metavar="DIR")
    parser.add_argument(
        "--precision", default="bf16", metavar="P", help="of the transformer: bf16 (default) | fp32 | fp16 | w8a8"
    )
    parser.add_argument(
        "--text-precision", metavar="P", help="bf16 (default; fp32 beside --precision fp32) | fp32 | w4a16"
    )
    parser.add_argument("--decoder-precision", metavar="P", help="bf16 (default; fp32 likewise) | fp32")
    parser.add_argument(
        "--attention", choices=("plain", "plugin"), default="plain", help="linear attention as operators or as one node"
    )
    parser.add_argument(
        "--profile", metavar="512|1024|bins|2048|4096", help="what engines are built for (default: the native square)"
    )
    parser.add_argument(
        "--only", metavar="GRAPH,...", help="some of text_encoder, transformer, decoder, encoder (default: all)"
    )
    parser.add_argument("--base", metavar="FOLDER", help="text encoder and autoencoder for a single file")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="pictures that calibrate w8a8 and fp16")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps of each of them")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_check)
    parser.add_argument("folder", metavar="DIR", help="what `sana export onnx` wrote")
    parser.add_argument("--model", metavar="M", help="the model to compare with (default: the one that was exported)")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="of the picture")


def _add_tensorrt(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_tensorrt)
    parser.add_argument("folder", metavar="DIR", help="what `sana export onnx` wrote")
    parser.add_argument("-o", "--output", required=True, metavar="ENGINES")
    parser.add_argument(
        "--target", default="current", metavar="sm75|sm80|sm86|sm89|sm120|sm121|current",
        help="compute capability of the GPU that the engines are for (default: current, the GPU of this machine)",
    )  # fmt: skip
    parser.add_argument(
        "--only", metavar="GRAPH,...", help="some of text_encoder, transformer, decoder (default: all three)"
    )
    parser.add_argument("--refit", action="store_true", help="engines whose weights can be replaced without a build")


def _onnx(args: argparse.Namespace) -> int:
    from sana_export.exporter import Request, export
    from sana_export.layout import GRAPHS

    request = Request(
        args.model, args.precision, args.text_precision, args.decoder_precision, args.attention, args.profile,
        GRAPHS if args.only is None else tuple(args.only.split(",")), args.base, samples=args.samples, steps=args.steps,
    )  # fmt: skip
    export(request, args.output)
    return 0


def _check(args: argparse.Namespace) -> int:
    from sana_export.check import check

    report = check(args.folder, args.model, args.steps)
    print(report)
    return 0 if report.passed else 1


def _tensorrt(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sana_export.build import build_engines
    from sana_export.engines import GRAPHS

    only = GRAPHS if args.only is None else tuple(args.only.split(","))
    build_engines(Path(args.folder), Path(args.output), args.target, only=only, refit=args.refit)
    return 0
