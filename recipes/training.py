"""What both training scripts share: one optimiser step, exact resumption, and pictures of how it goes.

Master weights are fp32; a network computes with a copy of them in the dtype of the run, which is what inference does with
the same modules. A batch is a function of (seed, step), so parameters, their running average, the optimiser's moments and
the step are all that a run has to remember: one resumed is bit for bit one that was never interrupted.

Under `torchrun --nproc-per-node N -m recipes.train_…` N processes share every batch, each on a GPU of its own or, on a
CPU, with one thread: two such processes are faster than one with two threads, for they meet once in a step.
"""

import argparse
import atexit
import math
import os
import pickle
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from recipes.muon import Muon, is_matrix
from sana_model.errors import MissingError, UserError
from sana_model.files import atomic

DECAY = 0.35
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Training:
    """One run on one network, kept in `folder`/state.pt: Muon for the matrices, AdamW for the other parameters.

    `fixed` holds the settings that cannot change between the start of a run and its continuation.
    """

    def __init__(self, network: nn.Module, folder: Path, args: argparse.Namespace, fixed: dict[str, str | int | float]):
        self.network, self.file, self.fixed = network, folder / "state.pt", fixed
        self.rank, self.processes = processes()
        self.steps, self.peak, self.warmup, self.decay = args.steps, args.lr, args.warmup, args.ema
        self.dtype = DTYPES[args.precision]
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        embeddings = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
        matrices = [p for p in self.parameters.values() if is_matrix(p) and id(p) not in embeddings]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.parameters.values() if id(p) not in chosen]
        adam = torch.optim.AdamW(others, lr=self.peak, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.optimizers = (Muon(matrices, lr=self.peak), adam)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._losses: list[float] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The network's output, computed in the dtype of the run; gradients reach the fp32 parameters."""
        return functional_call(self.network, {name: p.to(self.dtype) for name, p in self.parameters.items()}, inputs)

    @property
    def share(self) -> slice:
        """Which entries of a batch this process computes."""
        return slice(self.rank, None, self.processes)

    def update(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`, gradients clipped to norm 1; the running average follows.

        `loss` is the mean over this process's share; the shares of a batch differ by one image at most.
        """
        loss = loss / self.processes
        loss.backward()
        loss = loss.detach()
        sum_over_processes([loss, *(p.grad for p in self.parameters.values())])
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.peak * schedule(self.step, self.steps, self.warmup)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        keep = min(self.decay, (1 + self.step) / (10 + self.step))  # the first steps are forgotten soon
        with torch.no_grad():
            for name, p in self.parameters.items():
                self.average[name].lerp_(p, 1 - keep)
        self._losses.append(loss.item())

    def record(self, **metrics: float) -> None:
        """Add the mean loss since the last record, and other figures, to the history."""
        mean = sum(self._losses) / max(1, len(self._losses))
        self.history.append({"step": self.step, "loss": mean, **metrics})
        self._losses.clear()

    def numbers(self, minutes: float | None) -> Iterator[int]:
        """The steps that are left, with a progress bar; ends early after `minutes`, or at Ctrl-C and SIGTERM."""
        deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        stopped = []
        before = {
            kind: signal.signal(kind, lambda *_: stopped.append(True)) for kind in (signal.SIGINT, signal.SIGTERM)
        }
        interval = 0.1 if sys.stderr.isatty() else 30.0
        try:
            off = self.rank > 0
            with tqdm(total=self.steps, initial=self.step, unit="step", mininterval=interval, disable=off) as bar:
                while self.step < self.steps and not anywhere(bool(stopped) or time.monotonic() > deadline):
                    yield self.step
                    latest = " ".join(f"{k} {v:.4g}" for k, v in self.history[-1].items()) if self.history else ""
                    bar.set_postfix_str(latest, refresh=False)
                    bar.update(self.step - bar.n)
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def save(self) -> None:
        """Write everything that `resume` needs, in place of the state before."""
        state = {
            "fixed": self.fixed, "step": self.step, "history": self.history, "losses": self._losses, "average": self.average,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }  # fmt: skip
        with atomic(self.file) as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        """Continue the run of this folder where it was saved last, if there is one."""
        if not self.file.exists():
            return
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(f"{self.file} cannot be read ({error}); delete it to start again") from error
        for name, value in self.fixed.items():
            if state["fixed"].get(name) != value:
                raise UserError(
                    f"{self.file.parent} holds a run with {name} {state['fixed'].get(name)}, this one has {value};"
                    " use the same settings or another --out"
                )
        self.step, self.history, self._losses = state["step"], state["history"], state["losses"]
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state["parameters"][name])
                self.average[name].copy_(state["average"][name])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)


# ------------------------------------------------------------------------------------------------ several processes


def processes() -> tuple[int, int]:
    """The number of this process and how many share the run: (0, 1) unless torchrun started it."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        if not torch.cuda.is_available():  # gloo's threads, left to the end of the process, may abort it
            atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, all of them in one exchange."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(total.view(t.shape))


def anywhere(condition: bool) -> bool:
    """Whether it holds in any process, so that all of them stop after the same step."""
    if not dist.is_initialized():
        return condition
    flag = torch.tensor(float(condition))
    dist.all_reduce(flag)
    return flag.item() > 0


# ------------------------------------------------------------------------------------------------ settings


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, constant, and in the last `DECAY` of the steps down to zero.

    Unlike a cosine it leaves a run open: one that is still in the constant part can be given more steps, or fewer.
    """
    return min(1.0, (step + 1) / warmup, (steps - step) / (DECAY * steps))


def generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step."""
    # Of a seed, PyTorch's generator for CPUs uses the low 32 bits only.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{step}".encode()))


def arguments(description: str, *, steps: int, batch: int, lr: float, every: int) -> argparse.ArgumentParser:
    """The flags of both scripts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that recipes.data wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; one that exists is continued")
    parser.add_argument("--preset", choices=("embedded", "larger"), default="embedded", help="default: %(default)s")
    parser.add_argument("--size", type=int, choices=(128, 256), default=256, help="pixels (default: %(default)s)")
    parser.add_argument(
        "--centred", action="store_true", help="every picture in the middle, in one size: less to learn in a short run"
    )
    parser.add_argument("--steps", type=int, default=steps, help="of the whole run (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes, saved and ready to be continued")
    parser.add_argument("--batch", type=int, default=batch, help="images in a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=200, help="steps of rising learning rate (default: %(default)s)")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the running average (default: %(default)s)")
    parser.add_argument(
        "--every", type=int, default=every, help="steps between saves and sheets (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16", help="default: %(default)s")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UserError or MissingError for flags that no run can start with; make the folder of the run."""
    if min(args.steps, args.batch, args.every) < 1:
        raise UserError("--steps, --batch and --every must be at least 1")
    if args.batch < processes()[1]:
        raise UserError(f"--batch {args.batch} is too small for {processes()[1]} processes: each needs an image")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise MissingError("torch sees no NVIDIA GPU; use --device cpu")
    args.out.mkdir(parents=True, exist_ok=True)


# ------------------------------------------------------------------------------------------------ pictures


def psnr(images: Tensor, originals: Tensor) -> float:
    """Mean over a batch of the PSNR of each image in dB; values in [-1, 1], the images clamped to that."""
    error = (images.float().clamp(-1, 1) - originals).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error.clamp_min(1e-10))).mean().item()


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] → 8-bit RGB."""
    return Image.fromarray(((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def sheet(file: Path, images: Sequence[Image.Image], columns: int, captions: Sequence[str] = ()) -> None:
    """A contact sheet of images of one size, with a line of text below each where there are captions."""
    width, height = images[0].size
    line = 14 if captions else 0
    page = Image.new("RGB", (columns * width, -(-len(images) // columns) * (height + line)), "white")
    pen = ImageDraw.Draw(page)
    for i, image in enumerate(images):
        x, y = i % columns * width, i // columns * (height + line)
        page.paste(image, (x, y))
        if captions:
            pen.text((x + 2, y + height), captions[i][: width // 6], "black")
    with atomic(file) as temporary:
        page.save(temporary, format="PNG")


def chart(file: Path, history: Sequence[dict[str, float]]) -> None:
    """One panel for each figure of a history, over the steps; a scale that starts at 0 hides what happens late."""
    names = [name for name in history[0] if name != "step"]
    width, height, margin = 720, 200, 56
    page = Image.new("RGB", (width, height * len(names)), "white")
    pen = ImageDraw.Draw(page)
    last = history[-1]["step"]
    for panel, name in enumerate(names):
        values = [row[name] for row in history]
        low, high = min(values), max(values)
        top, bottom = panel * height + 24, (panel + 1) * height - 24

        def place(step: float, value: float, low=low, high=high, top=top, bottom=bottom) -> tuple[float, float]:
            up = (value - low) / (high - low) if high > low else 0.5
            return margin + (width - 2 * margin) * step / max(1, last), bottom - (bottom - top) * up

        pen.rectangle((margin, top, width - margin, bottom), outline="silver")
        pen.line([place(row["step"], row[name]) for row in history], fill="navy", width=2)
        pen.text((margin, top - 16), f"{name}: {values[-1]:.4g} at step {last}", "black")
        pen.text((2, top), f"{high:.4g}", "black")
        pen.text((2, bottom - 10), f"{low:.4g}", "black")
    with atomic(file) as temporary:
        page.save(temporary, format="PNG")
