"""`sana bench decode`: the autoencoder's decoder alone, at several sizes, by several runs that take turns.

A run is `backend:precision`, the precision being the decoder's. All decode the same latents with the same weights. Each is
checked against fp32: up to 1024 px plain PyTorch on the whole image, beyond that the CPU engine in bands, which is the
same image bit for bit as its own in one piece (tests/test_bands.py) and needs a fraction of the memory. What would not fit
into memory, by estimate, is not tried.
"""

import copy
import time
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from sana_bench import check, openvino, work
from sana_bench.harness import Clock, PeakMemory, Peaks, Results, free_memory, interleave, statistics_ms
from sana_bench.metrics import psnr, to_bytes
from sana_bench.outcome import Outcome, add_speedups
from sana_bench.weights import RunName, Weights, count
from sana_model import memory
from sana_model.config import AutoencoderConfig, ModelConfig
from sana_model.errors import MissingError, UserError
from sana_model.plan import resolve
from sana_model.settings import PRECISIONS, QUANTIZED
from sana_model.weights.interop import diffusers_autoencoder
from sana_model.weights.loaded import LoadedModel

BACKENDS = ("cpu", "cuda", "triton", "reference", "diffusers", "openvino")
LARGEST_WHOLE = 1024  # pixels; the oracle of larger images is ours in bands

CALIBRATION_SAMPLES = 4  # images, for OpenVINO's W8A8


def latents(config: AutoencoderConfig, size: int, seed: int) -> Tensor:
    """(1, C, h, w) for size × size pixels, as the decoder reads them: of the variance that it was trained on."""
    side = size // config.spatial_compression
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, config.latent_channels, side, side, generator=generator) / config.scaling_factor


class OwnDecoder:
    """This library's, with the plan of one backend. The interface of every decoder here is that of this class."""

    def __init__(self, backend: str, precision: str, weights: Weights):
        self.backend, self.precision, self.weights = backend, precision, weights
        self.dtype = PRECISIONS[precision]

    def prepare(self, size: int) -> None:
        """Everything before the first image, of size × size pixels."""
        self._plan = resolve(
            self.weights.config, self.backend, self.weights.device, dict.fromkeys(self._parts, self.precision)
        )
        self.autoencoder = self.weights.part("autoencoder", self.dtype)
        self._plan.prepare("autoencoder", self.autoencoder)
        self.autoencoder.use(self._plan.ops("autoencoder"))

    _parts = ("dit", "text_encoder", "autoencoder")

    def decode(self, z: Tensor) -> Tensor:
        """Latents of the network (1, C, h, w), fp32 → an image (1, 3, H, W)."""
        self._plan.clock.reset()
        return self.autoencoder.decode(z)

    def plan(self) -> dict:
        """How it was computed, and of ours, how many ms each op took in the last image."""
        rows = [asdict(row) for row in self._plan.rows if row.part == "autoencoder"]
        spent = {op: 1e3 * seconds for (_, op), seconds in self._plan.clock.seconds().items()}
        how = {"band_bytes": self.autoencoder.band_bytes, "transformed": self._plan.transformed}
        return {"backend": self.backend, "rows": rows, "op_ms": spent, **how}

    def needs(self, size: int) -> int:
        """Bytes for an image, beside the weights."""
        in_bands = self.backend == "cpu"
        return memory.decoder_bytes(self.weights.config, size, size, self.dtype, self.weights.device, in_bands=in_bands)

    def close(self) -> None:
        self.autoencoder = None


class DiffusersDecoder(OwnDecoder):
    """The installed AutoencoderDC on our weights, in the faster memory format of a trial at 512 px or less."""

    def prepare(self, size: int) -> None:
        self.network = diffusers_autoencoder(self.weights.part("autoencoder", self.dtype))
        side = min(size, 512) // self.weights.config.autoencoder.spatial_compression
        z = torch.randn(1, self.weights.config.autoencoder.latent_channels, side, side)
        self.trial_ms = {}
        for memory_format in (torch.contiguous_format, torch.channels_last):
            self._use(memory_format)
            times = []
            for _ in range(2):
                start = time.perf_counter()
                self.decode(z).sum().item()
                times.append(1e3 * (time.perf_counter() - start))
            self.trial_ms[memory_format] = min(times)
        self._use(min(self.trial_ms, key=self.trial_ms.get))

    def _use(self, memory_format: torch.memory_format) -> None:
        self.format = memory_format
        self.network.decoder.to(memory_format=memory_format)

    def decode(self, z: Tensor) -> Tensor:
        z = z.to(self.weights.device, self.dtype).contiguous(memory_format=self.format)
        return self.network.decode(z, return_dict=False)[0]

    def plan(self) -> dict:
        trials = {str(key).removeprefix("torch."): ms for key, ms in self.trial_ms.items()}
        return {"backend": self.backend, "memory_format_trial_ms": trials}

    def needs(self, size: int) -> int:
        return memory.decoder_bytes(self.weights.config, size, size, self.dtype, self.weights.device)

    def close(self) -> None:
        self.network = None


class OpenVINODecoder(DiffusersDecoder):
    """The same, compiled by OpenVINO for one size; calibrated for W8A8 with latents like those that are timed."""

    def prepare(self, size: int) -> None:
        openvino.check_installed(self.precision)
        network = diffusers_autoencoder(self.weights.part("autoencoder", torch.float32))
        examples = [
            {"hidden_states": latents(self.weights.config.autoencoder, size, seed)}
            for seed in range(CALIBRATION_SAMPLES)
        ]
        self.network = openvino.compiled(network.decoder, examples, self.precision)

    def decode(self, z: Tensor) -> Tensor:
        return self.network(hidden_states=z)

    def plan(self) -> dict:
        return {"backend": self.backend}


KINDS = {"diffusers": DiffusersDecoder, "openvino": OpenVINODecoder}


@dataclass
class Measured(Outcome):
    """What is known of one run at one size."""

    name: RunName
    size: int
    decoder: OwnDecoder
    check: dict = field(default_factory=dict)
    prepare_ms: float = 0.0
    memory: PeakMemory | None = None  # of the first image
    samples: list[float] = field(default_factory=list)  # ms
    plan: dict = field(default_factory=dict)


def refuse(names: list[RunName], sizes: list[int], config: ModelConfig) -> None:
    """Raise UserError for what cannot be measured."""
    factor = config.autoencoder.spatial_compression
    for size in sizes:
        if size <= 0 or size % factor:
            raise UserError(f"--size {size} is not a positive multiple of {factor}")
    for name in names:
        if name.backend not in BACKENDS:
            raise UserError(f"run {name}: the decoder is measured on {', '.join(BACKENDS)}")


class DecodeBench:
    """One comparison, of what `refuse` lets through. `run()` measures; the rows are in `results.document`."""

    def __init__(
        self, loaded: LoadedModel, names: list[RunName], sizes: list[int], device: torch.device, peaks: Peaks,
        results: Results, *, seed: int = 0, say=print,
    ):  # fmt: skip
        self.weights, self.config, self.device = Weights(loaded, device), loaded.config, device
        self.names, self.sizes, self.peaks, self.results = names, sizes, peaks, results
        self.seed, self.say, self.kinds = seed, say, KINDS
        self.measured: list[Measured] = []

    def latents(self, size: int, i: int) -> Tensor:
        """Of repetition i."""
        return latents(self.config.autoencoder, size, self.seed + 1000 * size + i).to(self.device)

    def run(self, repeat: int) -> dict:
        """Measure, and return the document. What was measured before Ctrl-C is written, too."""
        try:
            with torch.inference_mode():
                for size in self.sizes:
                    self.measure(size, repeat)
        finally:
            self.results.replace(self.rows())
        return self.results.document

    def measure(self, size: int, repeat: int) -> None:
        """All runs at one size. One after the other is prepared and checked, then all take turns."""
        runs = [
            Measured(name, size, self.kinds.get(name.backend, OwnDecoder)(name.backend, name.precision, self.weights))
            for name in self.names
        ]
        self.measured += runs
        z = self.latents(size, -1)
        oracle = self.oracle(size, z)
        for measured in runs:
            self.say(f"{size} px, {measured.name}")
            self.attempt(measured, self.first, measured, z, oracle)
        del oracle
        free_memory()

        def task(measured: Measured):
            def decode(i: int) -> float | None:
                if measured.status != "ok":
                    return None
                z, clock = self.latents(size, i), Clock(self.device)
                self.attempt(measured, measured.decoder.decode, z)
                clock.lap("decode")
                return clock.ms["decode"] if measured.status == "ok" else None

            return decode

        kinds = {self.peaks.kind(measured.name.precision) for measured in runs}
        alive = {str(measured.name): measured for measured in runs if measured.status == "ok"}
        tasks = {name: task(measured) for name, measured in alive.items()}
        for name, ms, verdict in interleave(tasks, repeat, lambda: self.peaks.probe(kinds)):
            measured = alive[name]
            self.say(f"{size} px, {name}: {ms:.0f} ms, {verdict}")
            if measured.count(verdict):
                measured.samples.append(ms)
                measured.plan = measured.decoder.plan()
                self.results.replace(self.rows())
        for measured in runs:
            measured.decoder.close()
        free_memory()

    def oracle(self, size: int, z: Tensor) -> Tensor | None:
        """The image in fp32; None where even that does not fit."""
        self.say(f"{size} px: the image in fp32")
        if size <= LARGEST_WHOLE:
            decoder = OwnDecoder("reference", "fp32", self.weights)
        else:
            z, weights = z.cpu(), self.weights
            if self.device.type != "cpu":
                there = copy.deepcopy(weights.loaded.autoencoder).cpu()
                weights = Weights(replace(weights.loaded, autoencoder=there), z.device)
            decoder = OwnDecoder("cpu", "fp32", weights)
        if decoder.needs(size) + self.copies("fp32") > memory.available(torch.device("cpu")):
            return None
        decoder.prepare(size)
        image = decoder.decode(z).float().cpu()
        decoder.close()
        return image

    def copies(self, precision: str) -> int:
        """Bytes of the weights in a precision, in a layout of its own."""
        return count(self.weights.loaded.autoencoder) * (
            1 if precision in QUANTIZED else PRECISIONS[precision].itemsize
        )

    def first(self, measured: Measured, z: Tensor, oracle: Tensor | None) -> None:
        """Prepare a run, decode a first image and compare it."""
        decoder, precision = measured.decoder, measured.name.precision
        needed, free = decoder.needs(measured.size) + self.copies(precision), memory.available(self.device)
        if needed > free:
            raise MemoryError(f"{needed / 1e9:.1f} GB more are needed, and {free / 1e9:.1f} GB are free")
        clock, shared = Clock(self.device), self.weights.shared_bytes
        with PeakMemory(self.device) as peak:
            decoder.prepare(measured.size)
            clock.lap("prepare")
            image = decoder.decode(z).float()
        image = image.cpu()
        peak.added -= self.weights.shared_bytes - shared  # whoever came first
        measured.prepare_ms, measured.memory, measured.plan = clock.ms["prepare"], peak, decoder.plan()
        if oracle is None:
            measured.check = {"against": "nothing: fp32 does not fit", "metric": "image_sqnr_db"}
            raise MissingError("the image in fp32, against which this would be checked, does not fit into memory")
        measured.check = check.summary([check.image_check(image, oracle, precision)], [])
        measured.check["psnr_db"] = psnr(to_bytes(image), to_bytes(oracle)).item()  # of 8-bit pixels
        measured.check["oracle"] = "plain PyTorch" if measured.size <= LARGEST_WHOLE else "the CPU engine, in bands"

    def attempt(self, measured: Measured, action, *args):
        """action(*args), or None where it can't be (`Outcome.attempt`)."""
        return measured.attempt(measured.name, measured.decoder.close, self.say, action, *args)

    # ------------------------------------------------------------------------------------------ rows

    def rows(self) -> list[dict]:
        """Everything that is known by now."""
        rows = [row for measured in self.measured if (row := self.row(measured)) is not None]
        add_speedups(rows)
        return rows

    def row(self, measured: Measured) -> dict | None:
        name, size = measured.name, measured.size
        row = {
            "kind": "decode", "name": f"{self.config.name}_{size}x{size}", "backend": name.backend,
            "precision": name.precision, "weights": self.weights.loaded.source,
            "workload": {"batch": 1, "height": size, "width": size, "steps": 0, "guidance": 0, "text_tokens": 0},
        }  # fmt: skip
        if measured.status != "ok":
            return row | {"status": measured.status, "reason": measured.reason}
        if not measured.samples:
            return None
        ms = statistics_ms(measured.samples)
        macs = work.decoder_macs(
            self.config.autoencoder, size, size, transformed=bool(measured.plan.get("transformed"))
        )
        percent = self.peaks.percent(2 * macs, ms["median"] / 1e3, name.precision)
        failures = [f"it runs at {percent:.0f} % of the measured peak"] if percent is not None and percent > 100 else []
        passed = measured.check["passed"] and not failures
        return row | {
            "status": "ok" if passed else "FAIL",
            "timing": {
                "method": "wall clock, synchronised", "warmup": 1, "n": len(measured.samples),
                "rejected": measured.rejected, "unsteady": measured.unsteady, "ms": ms, "raw_ms": measured.samples,
            },
            "stages_ms": {"decode": ms["median"]},
            "prepare_ms": measured.prepare_ms,
            "memory_mib": {
                "weights": round(self.copies(name.precision) / 2**20), "rss": round(measured.memory.bytes / 2**20),
                "added": round(measured.memory.added / 2**20),
            },
            "work": {
                "gmac": macs / 1e9, "peak": self.peaks.kind(name.precision), "pct_of_peak": {"decode": percent},
            },
            "check": measured.check | {"passed": passed, "failures": measured.check["failures"] + failures},
            "plan": measured.plan,
        }  # fmt: skip
