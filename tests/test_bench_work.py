"""What a benchmark counts, and what it calls equal."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sana_bench import check, work
from sana_bench.cases import cases
from sana_model.config import BUILT_IN
from sana_model.settings import PRECISIONS
from sana_model.weights import checkpoint_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("model", "height", "width", "gmac"),
    [("sana-0.6b", 512, 512, 157.811), ("sana-0.6b", 1024, 1024, 560.744), ("sana-1.6b", 1024, 1024, 1483.331)],
)
def test_dit_macs_are_those_that_torch_counts_in_diffusers(model, height, width, gmac):
    diffusers = pytest.importorskip("diffusers")
    dit = BUILT_IN[model].dit
    fields = {k: v for k, v in checkpoint_config.write_dit(dit).items() if not k.startswith("_")}
    with torch.device("meta"):
        theirs = diffusers.SanaTransformer2DModel(**fields)
        latents, states = torch.empty(1, 32, height // 32, width // 32), torch.empty(1, 300, dit.caption_channels)
        with FlopCounterMode(display=False) as counter:
            theirs(latents, encoder_hidden_states=states, timestep=torch.empty(1))
    ours = work.denoise_macs(dit, latents[0, 0].numel(), 1, (300,))
    assert ours == counter.get_total_flops() / 2
    assert ours / 1e9 == pytest.approx(gmac, abs=1e-3)  # as published for this model


@pytest.mark.parametrize(("height", "width", "gmac"), [(1024, 1024, 4184.306), (768, 1344, None)])
def test_decoder_macs_are_those_that_torch_counts_in_diffusers(height, width, gmac):
    diffusers = pytest.importorskip("diffusers")
    config = BUILT_IN["sana-0.6b"].autoencoder
    fields = {k: v for k, v in checkpoint_config.write_autoencoder(config).items() if not k.startswith("_")}
    with torch.device("meta"):
        theirs = diffusers.AutoencoderDC(**fields)
        latents = torch.empty(1, 32, height // 32, width // 32)
        with FlopCounterMode(display=False) as counter:
            theirs.decode(latents)
    ours = work.decoder_macs(config, height, width, folded=False)
    assert ours == counter.get_total_flops() / 2
    assert gmac is None or ours / 1e9 == pytest.approx(gmac, abs=1e-3)


def test_text_is_counted_once_and_steps_as_often_as_they_run():
    dit = BUILT_IN["sana-0.6b"].dit
    one, two = (work.denoise_macs(dit, 1024, steps, (1, 60)) for steps in (1, 2))
    text = sum(work.dit_text_macs(dit, length) for length in (1, 60))
    assert two - text == 2 * (one - text)


def test_sqnr_of_known_noise():
    signal = torch.randn(100_000)
    assert check.sqnr(signal + 0.1 * torch.randn(100_000), signal) == pytest.approx(20, abs=0.2)
    assert check.sqnr(signal, signal) == check.SQNR_CAP
    assert check.sqnr(signal * float("nan"), signal) == -check.SQNR_CAP


def test_neither_half_of_the_guided_batch_hides_behind_the_other():
    expected = torch.randn(2, 32, 4, 4)
    actual = expected.clone()
    assert check.dit_check(actual, expected, "bf16").passed
    actual[0] += 0.1 * torch.randn_like(actual[0])
    assert not check.dit_check(actual, expected, "bf16").passed


def noisy(signal: torch.Tensor, db: float) -> torch.Tensor:
    return signal + 10 ** (-db / 20) * torch.randn_like(signal)


def test_eight_bits_may_cost_what_they_cost_plain_pytorch():
    expected = torch.randn(2, 32, 16, 16)
    actual, asked = noisy(expected, 19.5), []

    def plain(db: float):
        return lambda: asked.append(db) or noisy(expected, db)

    assert not check.dit_check(actual, expected, "w8a8").passed
    found = check.dit_check(actual, expected, "w8a8", plain(20.5))
    assert found.passed and found.limit == pytest.approx(20.5 - check.PLAIN_LOSS, abs=0.3)
    assert re.fullmatch(r"fp32, of which plain PyTorch keeps 20\.\d dB", found.against)
    found = check.dit_check(actual, expected, "w8a8", plain(19))
    assert found.passed and found.limit == check.DIT_LIMITS["w8a8"] - check.LIMIT_LOSS
    for db in (21.8, 23, 40, 5):  # much better, within the limit, or so bad that it tells nothing
        assert not check.dit_check(actual, expected, "w8a8", plain(db)).passed
    assert not check.dit_check(actual, expected, "w8a8", lambda: None).passed
    assert asked == [20.5, 19, 21.8, 23, 40, 5]


def test_plain_pytorch_is_not_asked_where_it_changes_nothing():
    expected = torch.randn(2, 32, 16, 16)

    def plain():
        raise AssertionError("asked")

    assert check.dit_check(noisy(expected, 25), expected, "w8a8", plain).passed
    assert not check.dit_check(noisy(expected, 12), expected, "w8a8", plain).passed  # more than any weights may cost
    assert not check.dit_check(noisy(expected, 28), expected, "bf16", plain).passed
    assert not check.dit_check(noisy(expected, 14), expected, "w4a16", plain).passed


def test_kernel_error_is_measured_in_errors_of_torch():
    oracle = torch.randn(64, 64, dtype=torch.float64)
    plain = oracle.bfloat16()
    assert check.kernel_check(plain, plain, oracle)["passed"]
    worse = plain + 8 * torch.finfo(torch.bfloat16).eps * plain.abs().max()
    assert not check.kernel_check(worse, plain, oracle)["passed"]
    assert not check.kernel_check(plain.float(), plain, oracle)["passed"]


def test_a_sum_of_one_long_chain_may_be_as_wrong_as_its_roundings():
    ulp = torch.finfo(torch.float32).eps
    oracle = torch.ones(8, 8, dtype=torch.float64)
    actual = (oracle + 20 * ulp).float()
    assert not check.kernel_check(actual, oracle.float(), oracle)["passed"]
    assert not check.kernel_check(actual, oracle.float(), oracle, chain=300)["passed"]
    found = check.kernel_check(actual, oracle.float(), oracle, chain=500)
    assert found["passed"] and found["value"] == pytest.approx(20) and found["limit"] == pytest.approx(500**0.5)
    by_op = {case.op: case for case in cases() if case.name.startswith("0.6b_1024")}
    assert by_op["mix_ffn"].chain == 1152 + 2880 and by_op["gemm"].chain == 2880 and by_op["modulate"].chain == 0


def test_every_precision_has_limits():
    """4-bit text encoders, too (`cpu:w4a8+`)."""
    assert check.DIT_LIMITS.keys() == check.TEXT_LIMITS.keys() == PRECISIONS.keys()
    assert check.RANDOM_TEXT_LIMITS.keys() == PRECISIONS.keys()
