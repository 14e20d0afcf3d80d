"""`sana bench image|step|decode|kernels|quality|compare` and `sana tune`. Imports nothing heavy before a command runs."""

import argparse
import os
import re
import sys
from functools import partial
from pathlib import Path

from sana_model.errors import MissingError, UserError

QUICK_RUNS = "diffusers:bf16,reference:bf16,auto:bf16"
# What --isa sets for our kernels, PyTorch's own, oneDNN's and MKL's.
CAPS = ("SANA_KERNELS_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
ISAS = {
    "avx2": ("avx2", "avx2", "AVX2", "AVX2"),
    "avxvnni": ("avxvnni", "avx2", "AVX2_VNNI", "AVX2"),
    "avx512vnni": ("avx512vnni", "avx512", "AVX512_CORE_VNNI", "AVX512"),
    "avx512": ("avx512", "avx512", "AVX512_CORE_BF16", "AVX512"),
}


def add_parser(subparsers) -> None:
    """Add `bench` to the subparsers of `sana`; each command sets run=callable(args) -> exit status."""
    bench = subparsers.add_parser("bench", help="measure speed and quality, with parity, or compare two results")
    commands = bench.add_subparsers(metavar="image|step|decode|kernels|quality|compare", required=True)

    image = commands.add_parser("image", help="whole pictures, stage by stage, by several runs that take turns")
    image.set_defaults(run=_image)
    _add_picture(image)
    image.add_argument("--batch", type=int, default=1, metavar="B", help="prompts per picture batch")
    image.add_argument("--text-tokens", type=int, default=60, metavar="L", help="length of every prompt (default: 60)")
    image.add_argument(
        "--runs", default=QUICK_RUNS, metavar="BACKEND:PRECISION,...",
        help="auto, cpu, cuda, triton, reference, reference-compile, diffusers, diffusers-compile, openvino, onnxruntime, "
        "tensorrt; a precision that ends in + holds for text encoder and decoder, too, and one that ends in -eager is run "
        "without a CUDA graph; cpu@FOLDER is the DiT of a folder "
        f"that `sana quantize` made, and reference:w4a4 or reference@FOLDER what is stored, exactly (default: {QUICK_RUNS})",
    )  # fmt: skip
    _add_repeat(image, "repetitions of each run (default: 3)")
    _add_common(image, "256 px, 2 steps, 2 repetitions: under a minute with sana-tiny")

    step = commands.add_parser("step", help="one evaluation of the DiT, op by op, beside its matrix products alone")
    step.set_defaults(run=_step)
    step.add_argument("--model", default="sana-tiny", help="as for `sana generate` (default: sana-tiny)")
    step.add_argument("--size", metavar="WIDTHxHEIGHT", help="or one number for a square (default: the model's)")
    step.add_argument("--text-tokens", type=int, default=60, metavar="L", help="length of the caption (default: 60)")
    step.add_argument(
        "--runs", default=QUICK_RUNS, metavar="BACKEND:PRECISION,...", help=f"as for image (default: {QUICK_RUNS})"
    )
    _add_repeat(step, "repetitions of each run (default: 5)")
    _add_common(step, "2 repetitions")

    decode = commands.add_parser("decode", help="the decoder alone, at several sizes")
    decode.set_defaults(run=_decode)
    decode.add_argument("--model", default="sana-tiny", help="a model, or an autoencoder alone (default: sana-tiny)")
    decode.add_argument("--size", metavar="N,N,...", help="sides of square images (default: the model's)")
    decode.add_argument(
        "--runs", default=QUICK_RUNS, metavar="BACKEND:PRECISION,...",
        help=f"auto, cpu, cuda, triton, reference, diffusers, openvino, in the decoder's precision (default: {QUICK_RUNS})",
    )  # fmt: skip
    _add_repeat(decode, "repetitions of each run (default: 3)")
    _add_common(decode, "2 repetitions")

    kernels = commands.add_parser("kernels", help="one op at a time, on the shapes of the published models")
    kernels.set_defaults(run=_kernels)
    kernels.add_argument("op", nargs="?", help="default: all")
    kernels.add_argument(
        "--case", metavar="TEXT,...", default="", help="only cases whose name contains this, or one of these"
    )
    kernels.add_argument(
        "--backends", metavar="A,B",
        help="default: all that can run here, torch-compile, and torch-8bit, PyTorch's own 8-bit product on a GPU",
    )  # fmt: skip
    kernels.add_argument(
        "--dtypes", metavar="A,B", help="of fp32, bf16, fp16, w8a8, fp8 (default: bf16,fp32; with --quick bf16)"
    )
    _add_repeat(kernels, "rounds (default: 3)")
    _add_common(kernels, "the smallest case of each op in each dtype, without torch-compile, in one round")

    quality = commands.add_parser(
        "quality", help="what a precision costs in pictures, and whether they show what was asked",
        description="With --json q.json, the table goes to q.md, and a contact sheet of all runs to q.png.",
    )  # fmt: skip
    quality.set_defaults(run=_quality, repeat=None)
    _add_picture(quality)
    quality.add_argument("--images", type=int, metavar="N", help="pictures of each run (default: 512)")
    quality.add_argument("--batch", type=int, default=8, metavar="B", help="pictures at a time (default: 8)")
    quality.add_argument(
        "--runs", default="auto:bf16", metavar="BACKEND:PRECISION,...",
        help="as for `sana bench image`; fp32 and reference:bf16, the noise floor, are always there (default: auto:bf16)",
    )  # fmt: skip
    quality.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt per line (default: a fixed list)")
    quality.add_argument("--reference", type=Path, metavar="FOLDER", help="pictures for FID (from 5000 on) and KID")
    _add_common(quality, "8 pictures of 2 steps: seconds with sana-tiny")

    compare = commands.add_parser("compare", help="what became faster or slower between two result files")
    compare.set_defaults(run=_compare)
    compare.add_argument("old", type=Path, metavar="A.json")
    compare.add_argument("new", type=Path, metavar="B.json")


def _add_picture(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="sana-tiny", help="as for `sana generate` (default: sana-tiny)")
    parser.add_argument("--base", metavar="FOLDER", help="text encoder and autoencoder for a single file")
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", help="or one number for a square (default: the model's)")
    parser.add_argument("--steps", type=int, metavar="N", help="default: the model's")
    parser.add_argument("--guidance", type=float, metavar="G", help="default: the model's")


def _add_repeat(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--repeat", type=int, metavar="N", help=help)


def add_tune_parser(subparsers) -> None:
    """Add `tune` to the subparsers of `sana`."""
    tune = subparsers.add_parser(
        "tune", help="measure the tiles of the Triton kernels on this GPU, and propose a table"
    )
    tune.set_defaults(run=_tune)
    tune.add_argument("op", nargs="?", help="gemm | gemm_residual | linear_attention_from (default: all)")
    tune.add_argument("--dtypes", default="bf16,int8,fp8", metavar="D,...", help="default: bf16,int8,fp8")
    tune.add_argument(
        "--merge", nargs="+", type=Path, metavar="FILE", help="measure nothing: make one table of several proposals"
    )
    tune.add_argument(
        "--json", type=Path, metavar="FILE", default=Path("tiles.json"),
        help="where the proposal goes, in the form of sana_kernels/tiles.json (default: tiles.json)",
    )  # fmt: skip


def _add_common(parser: argparse.ArgumentParser, quick: str) -> None:
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--device", help="cpu | cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--isa", choices=ISAS, help="nothing newer than these instructions, in our kernels and in PyTorch's libraries"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where the results go, besides the table on the screen"
    )


def _setup(args: argparse.Namespace):
    """(device, empty results): what every benchmark begins with."""
    if args.isa is not None:
        if "torch" in sys.modules:
            raise UserError("--isa has to be there when the process starts: use the command line")
        os.environ |= zip(CAPS, ISAS[args.isa], strict=True)
    import torch

    from sana_bench.harness import Results
    from sana_model.threads import use_threads

    use_threads(args.threads)
    if args.seed < 0:
        raise UserError(f"--seed must be 0 or more, not {args.seed}")
    if args.repeat is not None and args.repeat < 1:
        raise UserError(f"--repeat must be at least 1, not {args.repeat}")
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not known; choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise MissingError(
            "no NVIDIA GPU can be used here (torch sees none); run with --device cpu, or see `sana doctor`"
        )
    torch.backends.cudnn.allow_tf32 = False  # of fp32 that PyTorch compiles, too: TF32 keeps 10 bits
    return torch.device(name), Results(args.json, args.seed, name)


def _image(args: argparse.Namespace) -> int:
    device, results = _setup(args)
    from sana_bench import report
    from sana_bench.harness import peaks
    from sana_bench.image import ImageBench, Workload
    from sana_bench.prompts import check_length
    from sana_bench.weights import PARTS
    from sana_model import memory
    from sana_model.plan import dtype_name
    from sana_model.settings import PRECISIONS, settings_for
    from sana_model.weights.models import find, load_model

    names = _run_names(args.runs, device)
    if args.batch < 1:
        raise UserError(f"--batch must be at least 1, not {args.batch}")
    source = find(args.model, args.base)
    config = source.config
    width, height = _size(args.size) if args.size else (config.size, config.size)
    steps, repeat = args.steps or config.steps, args.repeat or 3
    if args.quick:
        width, height = (width, height) if args.size else (256, 256)
        steps, repeat = args.steps or 2, args.repeat or 2
    guidance = config.guidance if args.guidance is None else args.guidance
    workload = Workload(height, width, steps, guidance, args.batch, args.text_tokens)
    # What cannot be painted is refused before anything is loaded.
    settings_for(config, "a picture", width=width, height=height, steps=steps, guidance=guidance)
    check_length(args.text_tokens, config)

    stored = {part: _stored([name.dtypes[part] for name in names], PRECISIONS["bf16"]) for part in PARTS}
    source.refuse_quantized("a benchmark, whose runs may be cpu@FOLDER,")
    memory.check_load(config, {part: dtype_name(dtype) for part, dtype in stored.items()}, device)
    _say(f"loading {args.model}")
    loaded = load_model(
        source, precision=stored["dit"], text_precision=stored["text_encoder"], decoder_precision=stored["autoencoder"]
    )
    bench = ImageBench(loaded, names, workload, device, peaks(device), results, seed=args.seed, say=_say)
    return _finish(bench, repeat, results, report.image_table)


def _step(args: argparse.Namespace) -> int:
    device, results = _setup(args)
    from sana_bench import report, step
    from sana_bench.harness import peaks
    from sana_bench.prompts import check_length
    from sana_model.settings import PRECISIONS, settings_for
    from sana_model.weights.models import find

    names, source = _run_names(args.runs, device), find(args.model)
    size = _size(args.size) if args.size else (source.config.size, source.config.size)
    settings_for(source.config, "a picture", width=size[0], height=size[1])  # as above
    check_length(args.text_tokens, source.config)
    _say(f"loading the DiT of {args.model}")
    loaded = step.load(source, _stored([name.dtypes["dit"] for name in names], PRECISIONS["bf16"]))
    bench = step.StepBench(
        loaded, names, size, args.text_tokens, device, peaks(device), results, seed=args.seed, say=_say
    )
    return _finish(bench, args.repeat or (2 if args.quick else 5), results, report.step_table)


def _decode(args: argparse.Namespace) -> int:
    device, results = _setup(args)
    from sana_bench import report
    from sana_bench.decode import DecodeBench, refuse
    from sana_bench.harness import peaks
    from sana_model.autoencoder.family import find_autoencoder
    from sana_model.settings import PRECISIONS
    from sana_model.weights.models import load_model

    names = _run_names(args.runs, device)
    try:
        sizes = [int(size) for size in args.size.split(",")] if args.size else None
    except ValueError as error:
        raise UserError(f"--size {args.size!r} is not a list of numbers such as 512,1024") from error
    source = find_autoencoder(args.model)
    sizes = sizes or [source.config.size]
    refuse(names, sizes, source.config)
    _say(f"loading {args.model}")
    # Random weights are as good in half the memory; others stay as they were saved, for fp32 to mean them.
    loaded = load_model(source, decoder_precision=PRECISIONS["bf16"] if source.random else None, parts=("autoencoder",))
    bench = DecodeBench(loaded, names, sizes, device, peaks(device), results, seed=args.seed, say=_say)
    return _finish(bench, args.repeat or (2 if args.quick else 3), results, report.decode_table)


def _stored(dtypes: list, preferred):
    """The one dtype that the weights are loaded in: of several, bf16; the other runs get converted copies of these."""
    return dtypes[0] if len(set(dtypes)) == 1 else preferred


def _kernels(args: argparse.Namespace) -> int:
    device, results = _setup(args)
    from sana_bench import report
    from sana_bench.harness import peaks
    from sana_bench.kernels import KernelBench, select

    dtypes = args.dtypes or ("bf16" if args.quick else "bf16,fp32")
    chosen = select(args.op, args.case, args.backends, dtypes, device, quick=args.quick)
    bench = KernelBench(chosen, device, peaks(device), results, seed=args.seed, say=_say)
    return _finish(bench, args.repeat or (1 if args.quick else 3), results, report.kernel_table)


def _finish(bench, repeat: int, results, table) -> int:
    """Measure, keep what there is even after Ctrl-C, and print the table. Status 1 where a row failed."""
    complete = False
    try:
        bench.run(repeat)
        complete = True
    finally:
        results.save(bench.peaks, complete)
        if results.document["results"]:
            print(table(results.document))
    return _status(results)


def _status(results) -> int:
    """0; 1 where a row failed; 3 where nothing could be measured here."""
    from sana_bench.gpu import failed

    rows = results.document["results"]
    if rows and all(row["status"] in ("not available", "not measured", "out of memory") for row in rows):
        return MissingError.exit_status
    return int(any(map(failed, rows)))


def _quality(args: argparse.Namespace) -> int:
    device, results = _setup(args)
    from sana_bench import reference, report
    from sana_bench.quality import Judges, QualityBench, Workload, read_prompts, trained_on
    from sana_model import files, memory
    from sana_model.settings import PRECISIONS
    from sana_model.weights.models import find, load_model

    names = _run_names(args.runs, device)
    if args.json and args.json.suffix in (".md", ".png"):
        raise UserError(f"--json {args.json}: the table and the pictures beside it are .md and .png; name a .json")
    table, sheet = (args.json.with_suffix(suffix) if args.json else None for suffix in (".md", ".png"))
    files.check_writable(*filter(None, (table, sheet)))
    source = find(args.model, args.base)
    config = source.config
    width, height = _size(args.size) if args.size else (config.size, config.size)
    steps = args.steps or (min(2, config.steps) if args.quick else config.steps)
    images = (8 if args.quick else 512) if args.images is None else args.images
    if args.reference and images < 2:
        raise UserError("--reference compares sets: paint at least 2 --images")
    if min(images, args.batch) < 1:
        raise UserError(f"--images and --batch must be at least 1, not {images} and {args.batch}")
    guidance = config.guidance if args.guidance is None else args.guidance
    workload = Workload(height, width, steps, guidance, images, min(args.batch, images))
    prompts = read_prompts(args.prompts)
    judges = Judges.load(device, random=source.random, sets=args.reference is not None)
    folder = reference.features(args.reference, judges.networks(), _say) if args.reference else {}

    source.refuse_quantized("a benchmark, whose runs may be cpu@FOLDER,")
    # As it was saved, so that "in fp32" means the checkpoint itself; random weights are as good in half the memory.
    stored = PRECISIONS["bf16"] if source.random else None
    memory.check_load(config, dict.fromkeys(("dit", "text_encoder", "autoencoder"), "bf16"), device)
    _say(f"loading {args.model}")
    loaded = load_model(source, precision=stored, text_precision=stored, decoder_precision=stored)
    bench = QualityBench(
        loaded, names, workload, prompts, device, results, judges=judges, folder=folder,
        trained_on=trained_on(source.folder), seed=args.seed, say=_say,
    )  # fmt: skip
    complete = False
    try:
        bench.run()
        complete = True
    finally:
        results.save(complete=complete)
        if bench.original.painted:
            text = report.quality_table(results.document)
            print(text)
            if args.json:
                files.write_text(table, text + "\n")
                bench.write_sheet(sheet)
    return _status(results)


def _run_names(text: str, device) -> list:
    """The runs that --runs names, each once, with the backend that `auto` stands for."""
    from sana_bench.weights import RunName
    from sana_model.plan import choose_backend

    auto = choose_backend("auto", device)
    texts = [name.strip() for name in text.split(",") if name.strip()]
    names = [RunName.parse(re.sub(r"^auto(?=[:@]|$)", auto, name)) for name in texts]
    if not names:
        raise UserError("--runs names no run")
    return list(dict.fromkeys(names))


def _compare(args: argparse.Namespace) -> int:
    from sana_bench import schema
    from sana_bench.compare import compare, render

    old, new = schema.load(args.old), schema.load(args.new)
    print(render(compare(old, new), old, new))
    return 0


def _write_tiles(path: Path, table: dict) -> None:
    from sana_bench import tune
    from sana_model import files

    files.write_text(path, tune.render(table))


def _tune(args: argparse.Namespace) -> int:
    import torch

    from sana_bench import tune
    from sana_kernels.tiles import arch
    from sana_model import files

    files.check_writable(args.json)
    if args.merge:
        table = tune.merge([tune.read(file) for file in args.merge])
    else:
        ops, dtypes = tune.wanted(args.op, args.dtypes)
        device = torch.device("cuda")
        gpu = torch.cuda.get_device_properties(device)
        shared = gpu.shared_memory_per_block_optin
        keep = partial(_write_tiles, args.json)
        table = tune.propose(ops, dtypes, arch(device), gpu.multi_processor_count, shared, tune.measure, _say, keep)
    _write_tiles(args.json, table)
    print(f"{args.json}: a proposal; to use it, look at it and copy it over sana_kernels/tiles.json")
    return 0


def _size(text: str) -> tuple[int, int]:
    """(width, height)."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise UserError(f"--size {text!r} is neither WIDTHxHEIGHT nor a number")
    return int(parts[0]), int(parts[-1])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
