"""`sana export onnx`: a model to a folder of ONNX graphs (sana_export.layout).

    load one part → sana_export.graphs → torch.export, all named dimensions dynamic → ONNX operators → clean → names → files

One part is in memory at a time. `torch.export.export(strict=False)` comes first because torch.onnx.export with
dynamic_shapes of its own specialises the sizes. The exporter's rewriting rules are left out: one of them deletes additions
of less than 1e-8, among them the `+ eps` without which a token that linear attention has nothing for becomes NaN. What is
needed of them is to fold constants and to drop what nothing reads (`clean`).
"""

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_export import calibration, graphs, layout, ops
from sana_export.layout import GRAPHS, PARTS, Graph, Manifest, Signature
from sana_kernels.quant.calibration import calibrate
from sana_model import memory
from sana_model.config import ModelConfig
from sana_model.errors import UserError
from sana_model.exported.onnxruntime import package
from sana_model.files import check_parent, check_replaceable
from sana_model.pipeline import load
from sana_model.plan import dtype_name
from sana_model.prompt import PromptEncoder
from sana_model.settings import DTYPES
from sana_model.tokenizer import ByteTokenizer, load_tokenizer
from sana_model.weights.loaded import LoadedModel
from sana_model.weights.models import Source, find, load_model
from sana_model.weights.saving import replacing, write_configs

OPSET = 22  # the first with convolutions in bf16
PRECISIONS = ("fp32", "bf16", "fp16", "w8a8")  # of the transformer
TEXT_PRECISIONS = ("fp32", "bf16", "w4a16")
DECODER_PRECISIONS = ("fp32", "bf16")
EXAMPLE = {
    "batch": 2,
    "tokens": 7,
    "latent_height": 5,
    "latent_width": 3,
}  # sizes that tracing meets: none 1, none alike
LOADED = {"text_encoder": "text", "dit": "dit", "autoencoder": "autoencoder"}  # what `load_model` calls the parts

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to export. Precisions of text encoder and decoder default to bf16, or fp32 beside an fp32 transformer."""

    model: str
    precision: str = "bf16"
    text_precision: str | None = None
    decoder_precision: str | None = None
    attention: str = "plain"
    profile: str | None = None
    only: tuple[str, ...] = GRAPHS
    base: str | None = None
    dialect: str = "diffusers"
    samples: int = 4  # pictures that are painted to calibrate W8A8
    steps: int = 10

    def precisions(self) -> dict[str, str]:
        """By graph. Raises UserError for a graph or a precision that there is not."""
        if unknown := set(self.only) - set(GRAPHS):
            raise UserError(f"there is no graph {', '.join(sorted(unknown))}; choose some of {', '.join(GRAPHS)}")
        others = "fp32" if self.precision == "fp32" else "bf16"
        chosen = {
            "text_encoder": (self.text_precision or others, TEXT_PRECISIONS),
            "transformer": (self.precision, PRECISIONS),
            "decoder": (self.decoder_precision or others, DECODER_PRECISIONS),
        }
        for graph, (precision, known) in chosen.items():
            if precision not in known:
                raise UserError(f"the {graph} is exported in {', '.join(known)}, not in {precision!r}")
        precisions = {graph: precision for graph, (precision, _) in chosen.items()}
        precisions["encoder"] = precisions["decoder"]
        return {graph: precisions[graph] for graph in GRAPHS if graph in self.only}


def export(request: Request, folder: str | Path, say: Say = print) -> Manifest:
    """Write the graphs of a model. The folder appears when all of it is there; an earlier export is replaced.

    Raises UserError for a model that cannot be read or is quantised, a precision that cannot be had (fp16 where activations
    leave its range), or a folder that is in use; MissingError without the packages of `sana-kernels[onnx]`.
    """
    for name in ("onnx", "onnxscript", "onnx_ir"):
        package(name)
    folder, precisions = Path(folder), request.precisions()
    _refuse_to_destroy(folder)
    source = find(request.model, request.base)
    source.refuse_quantized("exporting")
    if layout.is_export(source.folder):
        raise UserError(f"{request.model} holds exported graphs, not weights; name the model that they were made of")
    config = source.config.with_dialect(request.dialect)
    model = without_weights(source, config)
    profile = layout.profile(request.profile, config, prompt_tokens(config, model.tokenizer))
    made: dict[str, Graph] = {}
    manifest = Manifest(
        request.model, source.random, request.dialect, request.attention, profile, made, base=request.base
    )
    with replacing(folder) as place:
        write_configs(place, model, "float32", "fp32")
        for graph, precision in precisions.items():
            start = time.perf_counter()
            say(f"{graph} in {precision}")
            scales = calibrated(request) if graph == "transformer" else {}
            network = network_for(source, graph, precision, request.dialect)
            checksum = sha256(network)
            module = graphs.for_export(graph, network, request.attention, scales)
            file = layout.graph_file(place, graph)
            described = {"model": request.model, "graph": graph, "precision": precision, "weights_sha256": checksum}
            described |= {"attention": request.attention, "profile": profile.name, "written_by": layout.WRITTEN_BY}
            convert(module, layout.signature(graph, config), config, file, described)
            size = sum(part.stat().st_size for part in place.glob(f"{graph}.onnx*"))
            seconds = time.perf_counter() - start
            content = layout.file_sha256(place, graph)
            made[graph] = Graph(precision, checksum, content, OPSET, size, round(seconds, 1), scales)
            say(f"{folder / file.name}   {size / 1e6:.0f} MB, {seconds:.0f} s")
            del network, module
        layout.write(place, manifest)
    return manifest


def without_weights(source: Source, config: ModelConfig) -> LoadedModel:
    """A model's configuration and tokenizer."""
    tokenizer = load_tokenizer(source.tokenizer_folder) if source.tokenizer_folder else ByteTokenizer()
    return LoadedModel(config, None, None, tokenizer, None, source.name, source.random, source.tokenizer_folder)


def prompt_tokens(config: ModelConfig, tokenizer) -> int:
    """The longest input of the text encoder: the model's instruction and as many tokens of a prompt as count."""
    instruction = PromptEncoder(None, tokenizer, config).instruction(config.instruction)
    kept_from = len(tokenizer.encode(instruction)) - 1 if instruction else 0
    return kept_from + config.max_text_tokens


def calibrated(request: Request) -> dict[str, float]:
    """The static activation scales of a W8A8 transformer; of the others none, once fp16 is known to do for an fp16 one."""
    if request.precision not in ("fp16", "w8a8"):
        return {}
    pipe = load(
        request.model, backend="reference", device="cpu", precision="bf16", base=request.base, dialect=request.dialect
    )
    if request.precision == "fp16":
        calibration.check_range(pipe, request.samples, request.steps)
        return {}
    inputs = calibrate(pipe, calibration.PROMPTS, request.samples, request.steps)
    return calibration.activation_scales(inputs)


def network_for(source: Source, graph: str, precision: str, dialect: str) -> nn.Module:
    """The network of a graph with weights as they are exported, on the CPU."""
    dtype, part = DTYPES.get(precision, torch.bfloat16), PARTS[graph]
    memory.check_part(source.config, part, dtype_name(dtype))
    precisions = dict.fromkeys(("precision", "text_precision", "decoder_precision"), dtype)
    network = getattr(load_model(source, parts=(LOADED[part],), dialect=dialect, **precisions), part)
    if precision == "w4a16":
        graphs.quantize_weights(network)
    return network


# ------------------------------------------------------------------------------------------------ one graph


def convert(module: nn.Module, signature: Signature, config: ModelConfig, file: Path, metadata: dict[str, str]) -> None:
    """Write a module as an ONNX file, its weights beside it in <file>.data."""
    import onnx_ir

    step = config.autoencoder.spatial_compression
    examples, dynamic = _examples(signature, config, step)
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, (), examples, dynamic_shapes=dynamic, strict=False)
        exported = torch.onnx.export(
            program, (), kwargs=examples, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
            custom_translation_table=ops.translations(),
        )  # fmt: skip
        model = clean(exported.model)
    _name(model, signature)
    _pack_int4(model)
    model.producer_name, model.producer_version = layout.WRITTEN_BY.split()
    model.metadata_props.update(metadata)
    onnx_ir.save(model, file, external_data=f"{file.name}.data")


def _examples(signature: Signature, config: ModelConfig, step: int) -> tuple[dict[str, Tensor], dict]:
    """Inputs for tracing, and which of their dimensions are dynamic: images are `step` times as large as latents."""
    sizes = EXAMPLE | {side: EXAMPLE[f"latent_{side}"] * step for side in ("height", "width")}
    dims = {name: torch.export.Dim(name) for name in EXAMPLE}
    dims |= {side: step * dims[f"latent_{side}"] for side in ("height", "width")}
    examples = {}
    for name, shape in signature.input_shapes(**sizes).items():
        if name == "ids":
            examples[name] = torch.arange(sizes["batch"] * sizes["tokens"]).view(shape) % config.text.vocab
        elif name == "lengths":
            examples[name] = torch.tensor([sizes["tokens"], sizes["tokens"] - 3])
        else:
            examples[name] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dynamic = {
        name: {axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)}
        for name, (_, shape) in signature.inputs.items()
    }
    return examples, dynamic


def clean(model):
    """Fold constants, share what is computed twice, and drop what nothing reads."""
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants

    fold_constants(model)
    for step in (
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=False),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ShapeInferencePass(),  # the exporter leaves some values without a type, on which `twin` depends
        passes.ClearMetadataAndDocStringPass(),  # of each node: the Python stack that made it
    ):
        step(model)
    return model


def _name(model, signature: Signature) -> None:
    """Inputs, outputs and their dimensions as the signature calls them."""
    import onnx_ir

    graph = model.graph
    for values, described in ((graph.inputs, signature.inputs), (graph.outputs, signature.outputs)):
        assert len(values) == len(described), f"{values} and {list(described)} differ"
        for value, (name, (_, shape)) in zip(values, described.items(), strict=True):
            value.name = name
            value.shape = onnx_ir.Shape(shape)


def _pack_int4(model) -> None:
    """int8 initializers that a DequantizeLinear reads in blocks become int4 ones, two values in a byte."""
    import ml_dtypes
    import onnx_ir

    for node in model.graph:
        if node.op_type == "DequantizeLinear" and node.attributes.get_int("block_size", 0):
            value = node.inputs[0]
            values = value.const_value.numpy().astype(ml_dtypes.int4)
            value.const_value = onnx_ir.tensor(values, name=value.name)
            value.dtype = onnx_ir.DataType.INT4


def sha256(network: nn.Module) -> str:
    """Of names, shapes, dtypes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about its own deprecations and about packages that no SANA needs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ------------------------------------------------------------------------------------------------ files


def _refuse_to_destroy(folder: Path) -> None:
    check_parent(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file; graphs are written to a folder")
    if folder.is_dir() and any(folder.iterdir()) and not layout.is_export(folder):
        raise UserError(f"{folder} is in use and holds no graphs of ours; name another folder")
    if any(folder.glob("*.engine")):
        raise UserError(f"{folder} holds TensorRT engines, which graphs do not replace; name another folder")
    check_replaceable(folder)
