"""The DiT as one graph: what torch.compile and torch.export make of it computes what it computes."""

from dataclasses import replace

import pytest
import torch
from compare import relative_rms
from models import SMALL, SPRINT

from sana_model.plan import resolve
from sana_model.settings import precisions_for
from sana_model.weights.random_weights import random_dit

MODELS = {"plain": SMALL, "2K": replace(SMALL, dit=replace(SMALL.dit, pos_embed_scale=1.0)), "sprint": SPRINT}


def prepared(name: str, backend: str, precision: str):
    config = MODELS[name]
    plan = resolve(config, backend, torch.device("cpu"), precisions_for(precision))
    dit = random_dit(config.dit, seed=3, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    for block in dit.blocks:
        plan.prepare("dit", block)
    dit.ops = plan.ops("dit")
    caption = torch.randn(2, 9, config.dit.caption_channels)
    caption[..., ::40] *= 30
    guidance = torch.tensor([4.5, 1.0]) if config.dit.guidance_embeds else None
    latents = torch.randn(2, config.dit.in_channels, 5, 6)
    return dit, (latents, torch.tensor([999, 428]), caption, torch.tensor([9, 3]), guidance)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "backend", "precision"),
    [
        ("plain", "reference", "fp32"),
        ("plain", "reference", "w8a8"),
        ("plain", "reference", "fp8"),
        ("plain", "cpu", "bf16"),
        ("plain", "cpu", "w8a8"),
        ("2K", "cpu", "fp32"),
        ("sprint", "reference", "bf16"),
        ("sprint", "cpu", "fp32"),
    ],
)
@torch.inference_mode()
def test_the_dit_compiles_whole(name, backend, precision):
    dit, arguments = prepared(name, backend, precision)
    expected = dit(*arguments)
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph

    found = torch.compile(dit, backend=keep, fullgraph=True)(*arguments)
    assert len(graphs) == 1
    assert relative_rms(found, expected) <= (1e-5 if precision == "fp32" else 1e-2)
    ours = {str(node.target) for node in graphs[0].graph.nodes if str(node.target).startswith("sana.")}
    assert bool(ours) == (backend == "cpu"), "kernels are opaque, the reference is looked into"


@torch.inference_mode()
def test_the_comparison_notices_a_sum_that_is_missing():
    dit, arguments = prepared("plain", "reference", "fp32")

    def spoil(graph, _inputs):
        node = [node for node in graph.graph.nodes if "add" in str(node.target)][-1]
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
        graph.recompile()
        return graph

    wrong = torch.compile(dit, backend=spoil, fullgraph=True)(*arguments)
    assert relative_rms(wrong, dit(*arguments)) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_the_dit_exports(name):
    dit, arguments = prepared(name, "cpu", "fp32")
    with torch.no_grad():
        exported = torch.export.export(dit, arguments)
        assert relative_rms(exported.module()(*arguments), dit(*arguments)) <= 1e-5
