"""The registry: who is chosen, who is refused and in which words; compilers; threads and forks under the CPU kernels."""

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from variants import isas

import sana_kernels
from sana_bench.cases import cases
from sana_kernels import _cpu, backend
from sana_kernels.backend import BACKENDS, OPS, BackendUnavailable, explain, kernels, resolve, why_not
from sana_kernels.conv2d import ConvWeight
from sana_kernels.quant.formats import Int4

EAGER_OPS = {
    "linear_attention": lambda q, k, v, q_norm, k_norm, norm_eps, eps, **kw: sana_kernels.linear_attention(
        q, k, v, q_norm=q_norm, k_norm=k_norm, norm_eps=norm_eps, eps=eps, **kw
    ),
    "linear_attention_quantized": lambda q, k, v, q_norm, k_norm, norm_eps, eps, dtype, **kw: (
        sana_kernels.linear_attention(
            q, k, v, q_norm=q_norm, k_norm=k_norm, norm_eps=norm_eps, eps=eps, quantize=dtype, **kw
        )
    ),
    "linear_attention_from": lambda x, _, weight, w_scale, head_dim, eps, **kw: sana_kernels.linear_attention_from(
        x, weight, head_dim=head_dim, eps=eps, **kw
    ),
    "modulate": lambda x, shift, scale, eps, **kw: sana_kernels.modulate(x, shift, scale, eps=eps, **kw),
    "gate_residual": sana_kernels.gate_residual,
    "cross_attention": sana_kernels.cross_attention,
    "cross_attention_quantized": lambda q, k, v, lengths, dtype, **kw: sana_kernels.cross_attention(
        q, k, v, lengths, quantize=dtype, **kw
    ),
    "modulate_quantized": lambda x, shift, scale, eps, dtype, **kw: sana_kernels.modulate(
        x, shift, scale, eps=eps, quantize=dtype, **kw
    ),
    "mix_ffn": lambda x, _, h, w, we, we_scale, be, wd, bd, wp, wp_scale, gate, residual, **kw: sana_kernels.mix_ffn(
        x, h, w, we, be, wd, bd, wp, gate=gate, residual=residual, **kw
    ),
    "depthwise_glu": sana_kernels.depthwise_glu,
    "depthwise_glu_quantized": lambda h, height, width, weight, bias, dtype, **kw: sana_kernels.depthwise_glu(
        h, height, width, weight, bias, quantize=dtype, **kw
    ),
    "gemm": lambda x, _, weight, w_scale, bias, silu, gate, residual, dtype, **kw: sana_kernels.gemm(
        x, weight, bias, silu=silu, gate=gate, residual=residual, dtype=dtype, **kw
    ),
    "quantize": sana_kernels.quantize,
    "quantize_int4": sana_kernels.quantize_int4,
    "gemm_w4a16": lambda x, weight, scale, bias, silu, gate, residual, dtype, **kw: sana_kernels.gemm_w4a16(
        x, Int4(weight, scale), bias, silu=silu, gate=gate, residual=residual, dtype=dtype, **kw
    ),
    "gemm_w4a4": lambda x, x_scale, w, w_scale, low, up, bias, silu, gate, residual, dtype, **kw: (
        sana_kernels.gemm_w4a4(
            Int4(x, x_scale),
            Int4(w, w_scale),
            bias,
            low=low,
            up=up,
            silu=silu,
            gate=gate,
            residual=residual,
            dtype=dtype,
            **kw,
        )
    ),
    "rms_norm": lambda x, weight, bias, residual, activation, eps, **kw: sana_kernels.rms_norm(
        x, weight, bias, residual=residual, activation=activation, eps=eps, **kw
    ),
    "conv2d": lambda x, weight, scale, shape, bias, stride, activation, *rest, **kw: sana_kernels.conv2d(
        x, ConvWeight(weight, scale, tuple(shape)), bias, stride=stride, activation=activation, **kw
    ),
    "upsample": lambda x, weight, scale, shape, bias, band, above, **kw: sana_kernels.upsample(
        x, ConvWeight(weight, scale, tuple(shape)), bias, band=band, **kw
    ),
    "multi_scale": lambda x, depthwise, grouped, band, **kw: sana_kernels.multi_scale(
        x, depthwise, grouped, band=band, **kw
    ),
}
WITH_KERNELS = [op for op in OPS if "cpu" in [kernel.backend for kernel in kernels(op)]]
OPAQUE = [op for op in OPS if hasattr(torch.ops.sana, op)]  # to compilers, unless the reference is asked for


def arguments(op: str, precision: str = "fp32") -> tuple:
    """The op's smallest case."""
    found = [case for case in cases(op) if precision in case.precisions]
    return min(found, key=lambda case: case.macs).arguments(precision)


@pytest.mark.parametrize("op", OPS)
def test_plans_are_made_without_memory(op):
    """What meta tensors are told is what real ones get."""
    args = arguments(op)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    if op == "cross_attention":
        meta[3] = torch.empty(2, dtype=torch.int64, device="meta")
    assert explain(op, *meta, device="cpu") == explain(op, *args)
    assert list(explain(op, *args)) == list(BACKENDS)
    able = [name for name, reason in explain(op, *args).items() if reason is None]
    assert resolve(op, "auto", *meta, device="cpu").backend == able[0]
    torch.testing.assert_close(EAGER_OPS[op](*args), resolve(op, "auto", *args).run(*args), rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_results_lie_where_the_arguments_do(op):
    """Whatever torch's default device is. (A kernel that is given an address of another one ends the process.)"""
    args = arguments(op)
    expected = EAGER_OPS[op](*args)
    with torch.device("meta"):
        found = EAGER_OPS[op](*args)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_reasons_are_sentences():
    args = arguments("linear_attention")
    assert why_not("linear_attention", "cpu", *args, device="cuda") == "it runs on cpu tensors, and these are on cuda"
    assert "not torch.float64" in why_not("modulate", "cpu", *(a.double() for a in arguments("modulate")[:3]), 1e-6)
    with pytest.raises(
        ValueError, match="'gpu' is not known; choose one of auto, cuda, triton, cpu, library, reference"
    ):
        sana_kernels.gate_residual(*arguments("gate_residual"), backend="gpu")


def test_a_missing_module_is_a_reason_and_not_an_import_error(tmp_path):
    """As on a machine where the C++ module was never built, or was told of an instruction set that there is not."""
    script = f"""
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
import torch, sana_kernels
from sana_kernels import backend
x, row = torch.randn(1, 3, 8), torch.randn(1, 8)
assert torch.equal(sana_kernels.gate_residual(x, x, row), sana_kernels.gate_residual(x, x, row, backend="reference"))
print(backend.backend_status("cpu"))
try:
    from sana_model.plan import choose_backend
    choose_backend("auto", torch.device("cpu"))
except Exception as error:
    print("refused:", error)
"""
    environment = os.environ | {"SANA_KERNELS_ISA": "avx1024"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (
        "SANA_KERNELS_ISA=avx1024 is not known; choose portable, avx2, avxvnni, avx512vnni, avx512 or amx"
        in result.stdout
    ), result.stderr
    assert "refused: SANA_KERNELS_ISA=avx1024" in result.stdout  # not a slow picture without a word


def test_a_gpu_that_cannot_load_the_kernels_is_passed_over(monkeypatch):
    """An old driver, or a module that was built for other GPUs: known before the first launch."""
    refusals = iter(["no kernel image is available for execution on the device", None])
    module = SimpleNamespace(refusal=lambda: next(refusals))
    monkeypatch.setattr(backend, "extension", lambda name: (module, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status = backend.backend_status.__wrapped__
    assert "(no kernel image is available for execution on the device); update the driver" in status("cuda")
    assert status("cuda") is None


def test_an_op_without_a_kernel(monkeypatch):
    args = arguments("gate_residual")
    monkeypatch.setitem(
        backend._kernels, "gate_residual", {"reference": backend._kernels["gate_residual"]["reference"]}
    )
    assert why_not("gate_residual", "cpu", *args) == "there is no cpu kernel of gate_residual"
    with pytest.raises(BackendUnavailable, match=r"'cpu' cannot run gate_residual: there is .*python -m sana_kernels"):
        sana_kernels.gate_residual(*args, backend="cpu")
    assert sana_kernels.gate_residual(*args).shape == args[0].shape


@pytest.mark.parametrize("op", ["linear_attention", "modulate", "gate_residual", "cross_attention", "mix_ffn"])
def test_gradients_flow_through_the_reference_only(op):
    args = arguments(op)
    args[0].requires_grad_()
    with pytest.raises(BackendUnavailable, match=r"inference only .*torch\.inference_mode\(\)"):
        EAGER_OPS[op](*args, backend="cpu")
    result = EAGER_OPS[op](*args)
    result.sum().backward()
    assert args[0].grad is not None and args[0].grad.any()
    with torch.inference_mode():
        assert resolve(op, "auto", *args).backend == "cpu"


@pytest.mark.parametrize("op", OPAQUE)
def test_torch_library(op):
    args = (*arguments(op, "bf16"), "auto")
    torch.library.opcheck(getattr(torch.ops.sana, op).default, args)
    control = torch.library.Library("sana_test", "DEF")
    schema = str(getattr(torch.ops.sana, op).default._schema).partition("::")[2]
    control.define(schema)
    control.impl(op, getattr(torch.ops.sana, op), "CPU")
    wrong_dtype = lambda x, *rest: x.new_empty(x.shape, dtype=torch.half)  # noqa: E731
    torch.library.register_fake(f"sana_test::{op}", wrong_dtype, lib=control)
    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
        torch.library.opcheck(getattr(torch.ops.sana_test, op).default, args)


@pytest.mark.parametrize("op", OPS)
def test_compile_and_export_see_the_op(op):
    torch.compiler.reset()  # else dynamo counts the ops as recompilations of one forward, of which it allows 8
    given = arguments(op)
    torch._dynamo.reset()  # each op is compiled anew, not as another variant of the last

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            left = iter(tensors)
            return EAGER_OPS[op](*(next(left) if isinstance(a, torch.Tensor) else a for a in given))

    args = tuple(a for a in given if isinstance(a, torch.Tensor))
    with torch.no_grad():
        expected = EAGER_OPS[op](*given)
        compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)(*args)
        program = torch.export.export(Module(), args)
        exported = program.module()(*args)
    if op in OPAQUE:
        assert f"torch.ops.sana.{op}" in program.graph_module.code
        for result in (compiled, exported):
            torch.testing.assert_close(tuple(result), tuple(expected), rtol=0, atol=0)
    else:
        assert "torch.ops.sana" not in program.graph_module.code  # the compiler looks into the reference
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


def test_a_compiler_looks_into_the_reference():
    args = arguments("linear_attention")
    captured = []

    def keep(graph, _):
        captured.append(graph.code)
        return graph.forward

    def call(q, k, v):
        return sana_kernels.linear_attention(q, k, v, backend="reference")

    y = torch.compile(call, backend=keep, fullgraph=True)(*args[:3])
    assert "sana." not in captured[0] and "relu" in captured[0]
    assert torch.equal(y, call(*args[:3]))


def test_resolving_is_cheap():
    args = arguments("linear_attention")
    resolve("linear_attention", "auto", *args)
    start = time.perf_counter()
    for _ in range(2000):
        resolve("linear_attention", "auto", *args)
    assert (time.perf_counter() - start) / 2000 < 100e-6  # measured: 2 µs; the limit allows for a busy machine


def test_instruction_sets_are_capped():
    before = _cpu.isa()
    try:
        for isa in isas():
            _cpu.set_isa_cap(isa)
            assert _cpu.isa() == isa
        with pytest.raises(
            ValueError, match="avx9 is not known; choose portable, avx2, avxvnni, avx512vnni, avx512 or amx"
        ):
            _cpu.set_isa_cap("avx9")
        assert _cpu.isa() == isas()[-1]
    finally:
        _cpu.set_isa_cap(before)


def test_many_python_threads_at_once():
    """One has the pool, the others work by themselves; each gets what it gets alone."""
    torch.set_num_threads(2)
    inputs = [torch.randn(1, 200 + i, 3, 8, 32).unbind(2) for i in range(4)]
    alone = [sana_kernels.linear_attention(*qkv, backend="cpu") for qkv in inputs]
    wrong = []

    def work(i):
        for _ in range(40):
            if not torch.equal(sana_kernels.linear_attention(*inputs[i], backend="cpu"), alone[i]):
                wrong.append(i)

    team = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a thread hangs"
    assert not wrong


def test_workers_sleep_between_calls():
    torch.set_num_threads(2)
    x, row = torch.randn(1, 500, 1152), torch.randn(1, 1152)
    sana_kernels.gate_residual(x, x, row, backend="cpu")
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_with_a_pool_of_its_own():
    """A DataLoader or server forks after the parent has used the pool; the child has none of its threads."""
    script = """
import os, signal, torch, sana_kernels
torch.set_num_threads(2)
q, k, v = torch.randn(1, 300, 3, 8, 32).unbind(2)
y = sana_kernels.linear_attention(q, k, v, backend="cpu")
child = os.fork()
if child == 0:
    signal.alarm(60)
    threads = len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
    same = sana_kernels.linear_attention(q, k, v, backend="cpu").numpy().tobytes() == y.numpy().tobytes()
    grown = not threads or len(os.listdir("/proc/self/task")) > threads
    os._exit(0 if same and grown else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(sana_kernels.linear_attention(q, k, v, backend="cpu"), y)
print("both right")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "both right" in result.stdout, result.stderr


def test_registering_keeps_the_order(monkeypatch):
    monkeypatch.setitem(
        backend._kernels, "gate_residual", {"reference": backend._kernels["gate_residual"]["reference"]}
    )
    backend.register("gate_residual", "cpu", lambda *args: args[0], device="cpu", accepts=lambda x, *rest: None)
    backend.register("gate_residual", "cuda", lambda *args: args[0], device="cuda")
    assert [kernel.backend for kernel in backend.kernels("gate_residual")] == ["cuda", "cpu", "reference"]
    args = arguments("gate_residual")
    assert sana_kernels.gate_residual(*args) is args[0]
