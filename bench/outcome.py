"""What became of a run, whatever it is that runs: measured, given up, and how much faster than which baseline."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from sana_bench.harness import free_memory, out_of_memory
from sana_bench.weights import BASELINES
from sana_model.errors import MissingError, UserError


@dataclass(kw_only=True)
class Outcome:
    """A run's status, as in `schema`, and how its repetitions went."""

    status: str = "ok"
    reason: str = ""
    rejected: int = 0
    unsteady: int = 0

    def attempt(
        self, name: object, close: Callable[[], None], say: Callable[[str], None], action: Callable, *args,
        missing: str = "not available",
    ):  # fmt: skip
        """action(*args), or None where it can't be: out of memory, not here, or a crash, so that the rest goes on.

        `name`: of what is attempted. What can't be is `close`d. `missing`: the status of what this machine lacks.
        """
        try:
            return action(*args)
        except MissingError as error:
            self.status, self.reason = missing, str(error)
        except UserError as error:  # such as latents that overflow in fp16
            self.status, self.reason = "not measured", str(error)
        except Exception as error:
            self.status = "out of memory" if out_of_memory(error) else "error"
            self.reason = f"{type(error).__name__}: {error}"
        with suppress(Exception):  # after a kernel's crash a GPU refuses everything
            close()
            free_memory()
        say(f"{name}: {self.status}: {self.reason.splitlines()[0]}")
        return None

    def count(self, verdict: str) -> bool:
        """Note a repetition's verdict (`harness.interleave`); is it to be kept?"""
        self.rejected += verdict == "rejected"
        self.unsteady += verdict == "unsteady"
        return verdict != "rejected"


def add_speedups(rows: Iterable[dict]) -> None:
    """Give every row that is right its ratio to each baseline that is right, of the same kind and workload."""
    good = [row for row in rows if row["status"] == "ok" and row["kind"] != "first_image"]
    for row in good:
        row["speedup"] = {
            f"{other['backend']}:{other['precision']}": other["timing"]["ms"]["median"] / row["timing"]["ms"]["median"]
            for other in good
            if other is not row
            and other["backend"] in BASELINES
            and (other["kind"], other["workload"]) == (row["kind"], row["workload"])
        }
