"""The `sana` command: generate, show, reconstruct, verify, convert, quantize, export, doctor, bench, tune.

Exit status: 0; 2 a mistake in what was asked for; 3 this machine lacks something (GPU, package, memory, disk);
130 Ctrl-C (143 SIGTERM, 129 SIGHUP); 1, with a traceback, for anything else. Mistakes are one line on stderr. Nothing here
imports torch before a command runs: `sana --help` is immediate.
"""

import argparse
import errno
import io
import math
import os
import signal
import sys
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from threading import current_thread, main_thread
from traceback import walk_stack

from sana_bench.cli import add_parser as add_bench_parser
from sana_bench.cli import add_tune_parser
from sana_model import heap
from sana_model.commands.export import add_parser as add_export_parser
from sana_model.config import BUILT_IN, DIALECTS
from sana_model.errors import UserError

EPILOG = """\
exit status: 0; 2 a mistake in what was asked for; 3 this machine lacks something (GPU, package, memory, disk);
130 Ctrl-C; 1 anything else.  `sana COMMAND --help` lists the flags of a command."""

GENERATE = """\
Paint a picture. Without flags: the model's native size, 20 steps (2 for Sprint), guidance 4.5, seed 0, SANA's
instruction in front of the prompt, bf16; a sana.json in the model's folder may say otherwise. Existing files are
replaced, folders never. The settings are stored in the PNG: `sana show` prints them, `--from` paints it again."""

QUANTIZE = """\
Write a quantised copy of a model: W8A8 (int8), W4A8 (int4 weights) or W4A4 (SVDQuant). The model paints a few pictures,
which shows what its layers read, and is then quantised layer by layer; format, signal-to-noise ratio, size and kernel of
each are printed. After Ctrl-C or a kill, the same command goes on where it was. `sana generate --model OUT` takes OUT."""

MODEL_HELP = f"a diffusers folder, a .safetensors or .pth of a DiT, a hub id, or one of {', '.join(BUILT_IN)}"
_HELP = argparse.RawDescriptionHelpFormatter


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status. (argparse itself exits: 0 after --help, 2 after a wrong flag.)"""
    # PyTorch's threads busy-wait for one another. When another process has one of the cores, that makes every small op
    # take a scheduler slice (30 ms instead of 0.1): wait briefly, then sleep. Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    heap.keep_freed()
    _open_streams()
    lighter = None
    with _Interrupts() as interrupts:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: print(f"sana: warning: {message}", file=sys.stderr)
                args = parser().parse_args(argv)
                lighter = getattr(args, "lighter", None)
                status = args.run(args)
                sys.stdout.flush()
                return status
        except (Exception, KeyboardInterrupt) as error:
            interrupts.heard = False  # what follows takes no time
            if interrupts.came or isinstance(error, KeyboardInterrupt):
                with suppress(OSError):  # the terminal may be what has gone
                    print("sana: interrupted", file=sys.stderr)
                return 128 + (interrupts.came or signal.SIGINT)
            return _status(error, lighter)


def _open_streams() -> None:
    """Standard streams that print anything: one that is closed, as a daemon's may be, leads nowhere."""
    for number in range(3):  # or else the first picture would become the standard output
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show "→" or a prompt shows "?"


class _Interrupts:
    """Ctrl-C and the signals to end, SIGTERM and SIGHUP, as KeyboardInterrupt; `came` is the one that came.

    Raised in the middle of an import, KeyboardInterrupt may be swallowed: it waits for the import's end. Raised in the
    middle of a library's cleaning up, it may come out as another error: `came` tells.
    """

    came, heard, waits = 0, True, False

    def __enter__(self) -> "_Interrupts":
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if hasattr(signal, "SIGHUP"):
            usual[signal.SIGHUP] = signal.SIG_DFL
        # `sana … &` in a script ignores Ctrl-C, nohup SIGHUP, and only the main thread may have handlers: that stays.
        here = current_thread() is main_thread()
        self._usual = {number: how for number, how in usual.items() if here and signal.getsignal(number) == how}
        for number in self._usual:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        if self.waits:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._alarm)
        for number, how in self._usual.items():
            signal.signal(number, how)

    def _handle(self, number, frame) -> None:
        if not self.heard:
            return
        if number != signal.SIGALRM:
            self.came = number
        if not any(caller.f_code.co_filename == "<frozen importlib._bootstrap>" for caller, _ in walk_stack(frame)):
            raise KeyboardInterrupt
        if not self.waits:
            self._alarm, self.waits = signal.signal(signal.SIGALRM, self._handle), True
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # look again in 50 ms


def _status(error: Exception, lighter: str | None) -> int:
    """Say in one line what the user can mend, and return the exit status; any other error is raised again.

    `lighter`: flags of the command that let it do with less memory.
    """
    if isinstance(error, UserError):
        print(f"sana: {error}", file=sys.stderr)
        return error.exit_status
    if isinstance(error, BrokenPipeError):  # `sana doctor | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # of files, errors are sentences
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("sana: the disk is full, to which the standard output goes", file=sys.stderr)
        return 3
    if _is_out_of_memory(error):
        print(f"sana: out of memory; {f'try {lighter}' if lighter else 'free some'}", file=sys.stderr)
        return 3
    raise error


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = _Parser(prog="sana", description="SANA text-to-image.", epilog=EPILOG, formatter_class=_HELP)
    root.add_argument("--version", action="version", version=f"sana-kernels {version('sana-kernels')}")
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands.add_parser("generate", help="paint pictures", description=GENERATE, formatter_class=_HELP))

    show = commands.add_parser("show", help="print how a picture was painted")
    show.add_argument("picture", type=Path, metavar="PICTURE.png")
    show.set_defaults(run=_show)

    verify = commands.add_parser("verify", help="compare a model, part by part, with the installed diffusers")
    verify.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    verify.add_argument("--precision", default="fp32", help="fp32 (default) | bf16 | fp16")
    verify.add_argument("--base", metavar="FOLDER", help="text encoder and autoencoder for a single file")
    verify.set_defaults(run=_verify, lighter="--precision bf16")

    convert = commands.add_parser("convert", help="rewrite a model in another format, value for value")
    convert.add_argument("source", metavar="SOURCE", help=MODEL_HELP)
    convert.add_argument("destination", metavar="DESTINATION")
    convert.add_argument(
        "--to", choices=("diffusers", "original"), default="diffusers", help="folder, or .pth of the DiT"
    )
    convert.add_argument("--base", metavar="FOLDER", help="text encoder and autoencoder for a single file")
    convert.add_argument("--force", action="store_true", help="replace another model's folder")
    convert.set_defaults(run=_convert)

    quantize = commands.add_parser(
        "quantize", help="turn a model into 8 or 4 bits", description=QUANTIZE, formatter_class=_HELP
    )
    _add_quantize(quantize)

    reconstruct = commands.add_parser("reconstruct", help="a picture through the autoencoder and back, and its PSNR")
    reconstruct.add_argument("picture", type=Path, metavar="IN.png")
    reconstruct.add_argument("output", type=Path, metavar="OUT.png")
    reconstruct.add_argument(
        "--model", default="sana-tiny", metavar="M", help="a model, or an autoencoder alone (default: sana-tiny)"
    )
    reconstruct.add_argument("--backend", default="auto", metavar="B", help="auto (default) | reference | cpu | cuda")
    reconstruct.add_argument("--precision", default="fp32", metavar="P", help="fp32 (default) | bf16 | w8a8")
    reconstruct.set_defaults(run=_reconstruct, lighter="a smaller picture or --precision bf16")

    doctor = commands.add_parser("doctor", help="what this machine can run, and why the rest is off")
    doctor.set_defaults(run=_doctor)

    add_export_parser(commands)
    add_bench_parser(commands)
    add_tune_parser(commands)
    return root


class _Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"sana: {message}; see `{self.prog} --help`\n")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    """Flags left out are None: the default is the model's, or that of the picture in --from."""
    parser.set_defaults(run=_generate, lighter="--low-memory, a smaller --size or --precision bf16")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT")

    what = parser.add_argument_group("what to paint")
    what.add_argument("--size", type=_size, metavar="WIDTHxHEIGHT", help="multiples of 32; one number for a square")
    what.add_argument("--steps", type=int, metavar="N")
    what.add_argument("--guidance", type=_finite, metavar="G", help="classifier-free guidance scale; 1 is off")
    what.add_argument("--seed", type=int, metavar="S", help="picture i of several starts from S + i")
    what.add_argument(
        "--negative",
        dest="negative_prompt",
        metavar="T",
        help="what to keep out of the picture, where there is guidance",
    )
    what.add_argument("--num-images", type=int, metavar="K", help="writes OUT-0.png, OUT-1.png, ... when K > 1")
    what.add_argument("--instruction", metavar="default|none|FILE", help="the text in front of the prompt")
    what.add_argument("--sampler", metavar="NAME", help="flow_dpm | flow_euler; scm for Sprint")
    what.add_argument(
        "--pag", dest="pag_scale", type=_finite, metavar="SCALE", help="perturbed-attention guidance scale"
    )
    what.add_argument("--guidance-interval", type=_interval, metavar="LO,HI", help="guide only where LO <= sigma <= HI")
    what.add_argument(
        "--binning", action=argparse.BooleanOptionalAction, help="paint in the nearest trained ratio, resize and crop"
    )

    model = parser.add_argument_group("with what")
    model.add_argument("--model", metavar="M", help=f"{MODEL_HELP} (default: sana-tiny)")
    model.add_argument("--base", metavar="FOLDER", help="text encoder and autoencoder for a single file")
    model.add_argument(
        "--backend", metavar="B",
        help="auto (default) | reference | cpu | cuda | triton; of exported folders onnxruntime | tensorrt",
    )  # fmt: skip
    model.add_argument("--precision", metavar="P", help="of the DiT: bf16 | fp32 | fp16 | w8a8 | fp8 | w4a8 | w4a4")
    model.add_argument("--text-precision", metavar="P", help="of the text encoder, where also w4a16 is worth its while")
    model.add_argument("--decoder-precision", metavar="P", help="likewise: bf16 | fp32 | w8a8")
    model.add_argument("--decoder", metavar="D", help="another autoencoder: lite, or a folder, file or hub id")
    model.add_argument(
        "--exact", action="store_true", default=None, help="compute quantised layers as they are stored, slowly"
    )
    model.add_argument(
        "--lora", action="append", metavar="FILE[:STRENGTH]", help="a LoRA of the DiT; may be given several times"
    )
    model.add_argument("--dialect", choices=DIALECTS, help="which public implementation to follow where they differ")
    model.add_argument("--device", metavar="D", help="cpu | cuda | cuda:N")
    model.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    model.add_argument(
        "--low-memory", action="store_true", help="free the text encoder after encoding; on a GPU, decode in tiles"
    )
    model.add_argument(
        "--tiled",
        action=argparse.BooleanOptionalAction,
        help="decode in blended tiles, as diffusers does: not the same pixels",
    )
    model.add_argument(
        "--no-cuda-graph", dest="cuda_graph", action="store_false", help="on a GPU, start every kernel from Python"
    )

    output = parser.add_argument_group("input and output")
    output.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="default: out.png; with --prompts a folder, out"
    )
    output.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="one prompt per line ('#' starts a comment line), or a .jsonl of settings; pictures and results.jsonl go"
        " to the folder -o, and what is already there is not painted again",
    )  # fmt: skip
    output.add_argument(
        "--from", dest="picture", type=Path, metavar="PICTURE.png", help="paint it again, with the flags given"
    )
    output.add_argument("--plan", action="store_true", help="print which kernel runs in which precision, then paint")
    output.add_argument("--json", type=Path, metavar="FILE", help="write settings, ms per stage, plan and versions")


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_quantize)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--base", metavar="FOLDER", help="text encoder and autoencoder for a single file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace another program's model")

    what = parser.add_argument_group("what to make")
    what.add_argument("--precision", required=True, metavar="P", help="of the DiT: w8a8 | w4a8 | w4a4")
    what.add_argument("--text-precision", metavar="P", help="of the text encoder: w4a16 | w8a8; default: as it is")
    what.add_argument("--rank", type=int, metavar="R", help="of the low-rank branch; default: 32 for w4a4, else 0")
    what.add_argument(
        "--smooth", action=argparse.BooleanOptionalAction, help="search smoothing scales; default: for w4a4 only"
    )
    what.add_argument("--gptq", action="store_true", help="round 4-bit weights by GPTQ")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--calibration", type=Path, metavar="FILE", help="prompts to paint, one per line; default: 32 bundled ones"
    )
    how.add_argument("--samples", type=int, default=16, metavar="N", help="pictures to paint (default 16; 0: none)")
    how.add_argument("--steps", type=int, metavar="N", help="of each picture; default: the model's")
    how.add_argument("--seed", type=int, default=0, metavar="S")
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads")


def _size(text: str) -> tuple[int, int]:
    width, by, height = text.lower().replace("×", "x").partition("x")
    try:
        return int(width), int(height if by else width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1024x768") from error


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def _interval(text: str) -> tuple[float, float]:
    values = tuple(_finite(part) for part in text.split(","))
    if len(values) != 2 or values[0] > values[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not an interval such as 0.2,0.8")
    return values


def _generate(args: argparse.Namespace) -> int:
    from sana_model.commands.generate import run

    return run(args)


def _show(args: argparse.Namespace) -> int:
    import json

    from sana_model.png import read_metadata

    metadata = read_metadata(args.picture)
    text = metadata.parameters() + "\n" + json.dumps(metadata.as_json(), indent=2, ensure_ascii=False)
    # Pictures come from strangers: no control sequence in a prompt may reach the terminal.
    print("".join(c if c.isprintable() or c == "\n" else "?" for c in text))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from sana_model.settings import DTYPES
    from sana_model.weights.verify import verify

    if args.precision not in DTYPES:
        raise UserError(f"precision {args.precision!r} is none to verify in; choose one of {', '.join(DTYPES)}")
    report = verify(args.model, args.precision, base=args.base)
    print(report)
    return 0 if report.passed else 1


def _convert(args: argparse.Namespace) -> int:
    from sana_model.weights.models import convert

    convert(args.source, args.destination, args.to, base=args.base, force=args.force)
    print(args.destination)
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from sana_model.commands.quantize import run

    return run(args)


def _reconstruct(args: argparse.Namespace) -> int:
    from sana_model.commands.reconstruct import run

    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    from sana_kernels.diagnostics import describe, render
    from sana_model.plan import precisions_here

    print(render(describe()))
    print("\nprecisions, on the fastest backend here\n" + precisions_here())
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """What torch raises when an allocation fails, on a GPU and on the CPU, told without importing torch."""
    on_gpu, on_cpu = type(error).__name__ == "OutOfMemoryError", "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and (on_gpu or on_cpu))
