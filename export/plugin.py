"""Linear attention in TensorRT engines as our own kernels: a quick-deployable plugin, ahead of time.

Written against the documented API of `tensorrt` (11), not yet run; `tensorrt-rtx` has no plugins (bench/notes/tensorrt.md).

    sana::linear_attention(q, k, v)          one node of the graph (`sana export onnx --attention plugin`) becomes three,
      state(k, v) → states                   because a plugin of this kind launches one kernel and has no scratch memory
      sum(states) → state
      apply(q, state) → out                  csrc/linear_attention/linear_attention_plugin.cu

nvcc compiles the kernels to PTX here, TensorRT keeps that in the engine, and the engine then runs without us: each plugin
tells it a kernel's name, and grid, block and integer arguments as expressions of the shapes (`Launch`). The expressions are
TensorRT's symbols in a build and plain numbers in tests, where the same kernels run on the emulator.

What it may gain: the plain graph writes relu(q), relu(k) and a padded v, and reads them again. What it may cost: layers
on both sides of a plugin are not fused with it. Default is the plain graph, which every runtime reads.
"""

import hashlib
import importlib
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sana_model.errors import MissingError, UserError
from sana_model.exported.tensorrt_library import Library

SOURCE = Path("csrc") / "linear_attention" / "linear_attention_plugin.cu"
NAMESPACE, NODE = "sana", "linear_attention"
D = 32  # channels per head, the only ones that these kernels take, and SANA's
MIN_CHUNK, MAX_CHUNKS, STEP = 128, 16, 32  # tokens, chunks and tokens, as in linear_attention.cu
NAMES = {"BF16": "bf16", "FLOAT": "fp32", "HALF": "fp16"}  # TensorRT's and the kernels'
THREADS = {"bf16": 128, "fp32": 256, "fp16": 256}  # per block: on tensor cores, and plainly
APPLIED = {"bf16": 256, "fp32": 32, "fp16": 32}  # tokens whose outputs a block of `apply` makes


@dataclass(frozen=True)
class Launch:
    """One kernel's launch; numbers, or expressions of shapes."""

    kernel: str
    grid: tuple
    block: int
    shared: int  # bytes
    arguments: tuple  # integers, between the addresses of inputs and outputs


def chunk_tokens(N, cdiv: Callable, larger: Callable):
    """Tokens per chunk: at most MAX_CHUNKS chunks, of MIN_CHUNK tokens at least. cdiv: ceiling division; larger: maximum."""
    return cdiv(larger(cdiv(N, MAX_CHUNKS), MIN_CHUNK), STEP) * STEP


def launch_state(dtype: str, B, N, H, cdiv: Callable, larger: Callable) -> Launch:
    chunk = chunk_tokens(N, cdiv, larger)
    return Launch(f"sana_linear_attention_state_{dtype}", (B * H, cdiv(N, chunk)), THREADS[dtype], 0, (N, H, chunk))


def launch_sum(B, H, chunks) -> Launch:
    return Launch("sana_linear_attention_sum", (-(-D * (D + 1) // 256), B * H), 256, 0, (chunks,))


def launch_apply(dtype: str, B, N, H, eps: float, cdiv: Callable) -> Launch:
    shared = 0 if dtype == "bf16" else (D + STEP) * (D + 1) * 4
    (bits,) = struct.unpack("<i", struct.pack("<f", eps))  # a plugin passes integers only
    grid = (B * H, cdiv(N, APPLIED[dtype]))
    return Launch(f"sana_linear_attention_apply_{dtype}", grid, THREADS[dtype], shared, (N, H, bits))


def split(model) -> None:
    """Replace, in an onnx.ModelProto, every node of linear attention by the three whose plugins `register` makes."""
    from onnx import helper

    plugin = {"domain": NAMESPACE, "plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1}
    nodes = []
    for node in model.graph.node:
        if (node.domain, node.op_type) != (NAMESPACE, NODE):
            nodes.append(node)
            continue
        (q, k, v), (out,) = node.input, node.output
        eps = next(helper.get_attribute_value(a) for a in node.attribute if a.name == "eps")
        states, state = f"{out}_states", f"{out}_state"
        nodes += [
            helper.make_node(f"{NODE}_state", [k, v], [states], f"{node.name}_state", **plugin),
            helper.make_node(f"{NODE}_sum", [states], [state], f"{node.name}_sum", **plugin),
            helper.make_node(f"{NODE}_apply", [q, state], [out], f"{node.name}_apply", eps=eps, **plugin),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def split_file(file: Path) -> bytes:
    """The graph of a file after `split`, without the weights in the file beside it."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    split(model)
    return model.SerializeToString()


def name(library: Library) -> str:
    """What an engine's record says of its plugins. Raises MissingError or UserError where they cannot be built."""
    _module(library)
    return f"plugin {hashlib.sha256(ptx()).hexdigest()[:12]}"


def network_flags(api) -> int:
    """Creation flags of a network that has plugins: their compiled kernels, not Python, go into the engine."""
    return 1 << int(api.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)


@cache
def ptx() -> bytes:
    """The kernels, for sm_80 and newer. Raises MissingError without nvcc or the sources."""
    from sana_bench.resources import ROOT, find_nvcc

    nvcc, source = find_nvcc(), ROOT / SOURCE
    if nvcc is None or not source.is_file():
        what = "nvcc of CUDA 13" if nvcc is None else f"a checkout, with {SOURCE}"
        raise MissingError(
            f"graphs with plugins are built with {what}, which is not here; or export with --attention plain"
        )
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "plugin.ptx"
        command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-ptx", "-arch=compute_80", source, "-o", result]
        run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if run.returncode:
            raise UserError(f"nvcc cannot compile {SOURCE}: {run.stderr.strip()}")
        return result.read_bytes()


def _module(library: Library):
    """`tensorrt.plugin`."""
    try:
        return importlib.import_module(f"{library.api.__name__}.plugin")
    except ImportError as error:
        raise UserError(
            f"{library} has no plugins; build this export with `tensorrt` on the GPU that it is for, or export with"
            " --attention plain"
        ) from error


@cache
def register(library: Library) -> None:
    """Make the three plugins known to TensorRT, once."""
    api, trtp = library.api, _module(library)
    code = ptx()
    Desc, Symbol = trtp.TensorDesc, trtp.SymInt32

    def launched(launch: Launch) -> tuple:
        parameters = trtp.KernelLaunchParams()
        parameters.grid_x, parameters.grid_y = launch.grid
        parameters.block_x, parameters.shared_mem = launch.block, launch.shared
        arguments = trtp.SymIntExprs.from_tuple([Symbol(argument) for argument in launch.arguments])
        return launch.kernel.encode(), code, parameters, arguments

    @trtp.register(f"{NAMESPACE}::{NODE}_state")
    def describe_state(k: Desc, v: Desc) -> Desc:
        B, N, H, _ = k.shape_expr
        chunks = trtp.cdiv(N, chunk_tokens(N, trtp.cdiv, trtp.max))
        return trtp.from_shape_expr((B, H, chunks, D, D + 1), dtype=api.float32)

    @trtp.aot_impl(f"{NAMESPACE}::{NODE}_state")
    def compile_state(k, v, outputs, tactic):
        B, N, H, _ = k.shape_expr
        return launched(launch_state(NAMES[k.dtype.name], B, N, H, trtp.cdiv, trtp.max))

    @trtp.register(f"{NAMESPACE}::{NODE}_sum")
    def describe_sum(states: Desc) -> Desc:
        B, H = states.shape_expr[0], states.shape_expr[1]
        return trtp.from_shape_expr((B, H, D, D + 1), dtype=api.float32)

    @trtp.aot_impl(f"{NAMESPACE}::{NODE}_sum")
    def compile_sum(states, outputs, tactic):
        B, H, chunks = states.shape_expr[0], states.shape_expr[1], states.shape_expr[2]
        return launched(launch_sum(B, H, chunks))

    @trtp.register(f"{NAMESPACE}::{NODE}_apply")
    def describe_apply(q: Desc, state: Desc, eps: float) -> Desc:
        return q.like()

    @trtp.aot_impl(f"{NAMESPACE}::{NODE}_apply")
    def compile_apply(q, state, eps, outputs, tactic):
        B, N, H, _ = q.shape_expr
        return launched(launch_apply(NAMES[q.dtype.name], B, N, H, eps, trtp.cdiv))
