"""A 16-bit graph as one that ONNX Runtime's CPU provider can run, derived node by node.

    every bf16 (or fp16) initializer        → its value in fp32
    every operator with a 16-bit result     → the operator in fp32, a Cast to 16 bits and a Cast back

So each operator computes in fp32 and rounds its result once, which is what a GPU does. A twin runs without graph
optimisations: they would take the pairs of Casts for nothing.
"""

from pathlib import Path


def write_twin(source: Path, destination: Path) -> None:
    """Write the twin of an ONNX file, weights beside it; a graph in fp32 is its own."""
    import onnx_ir

    model = onnx_ir.load(source)
    derive(model)
    onnx_ir.save(model, destination, external_data=f"{destination.name}.data")


def derive(model) -> None:
    """Make an `onnx_ir.Model` its twin, in place."""
    import numpy as np
    import onnx_ir as ir

    narrow, wide = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16), ir.DataType.FLOAT

    def widened(tensor, name: str):
        return ir.tensor(tensor.numpy().astype(np.float32), name=name)

    graph = model.graph
    for value in graph.initializers.values():
        if value.const_value.dtype in narrow:
            value.const_value = widened(value.const_value, value.name)
            value.dtype = wide
    for node in list(graph):
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in narrow:
                node.attributes[attribute.name] = ir.AttrTensor(
                    attribute.name, widened(attribute.value, attribute.name)
                )
        if node.op_type == "Cast" and node.attributes["to"].as_int() in narrow:
            node.attributes["to"] = ir.AttrInt64("to", wide)
        for value in node.outputs:
            if value.dtype is None:
                raise ValueError(f"{node.op_type} {node.name} has an output of unknown type")
            if value.dtype in narrow:
                _round(ir, graph, node, value, value.dtype)


def _round(ir, graph, node, value, dtype) -> None:
    """Whoever reads `value` reads it rounded to `dtype` from now on."""
    users = list(value.uses())
    value.dtype = ir.DataType.FLOAT
    narrow = ir.node("Cast", [value], {"to": dtype})
    narrow.outputs[0].dtype, narrow.outputs[0].shape = dtype, value.shape
    back = ir.node("Cast", narrow.outputs, {"to": ir.DataType.FLOAT})
    back.outputs[0].dtype, back.outputs[0].shape = ir.DataType.FLOAT, value.shape
    graph.insert_after(node, [narrow, back])
    for user, index in users:
        user.replace_input_with(index, back.outputs[0])
