"""What an accelerator does otherwise than the CPU on which a rehearsal is traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ridgeline.rehearse.rehearse import Rehearsal


@dataclass(frozen=True)
class Difference:
    """One operation, or one taker of memory that is no tensor."""

    what: str
    traced: str
    """What the rehearsal counts."""
    there: str
    """What the target does."""
    source: str

    def __str__(self) -> str:
        return f"{self.what}: traced {self.traced}; there {self.there} ({self.source})"


def differences_of(found: Rehearsal) -> list[Difference]:
    """Those that matter to a run."""
    layout = found.layout
    rows = [
        Difference(
            "attention",
            "the CPU's flash kernel: q, k, v, output and a float32 number per row and head",
            "the same tensors, and two seeds of 8 bytes"
            + (", in bf16 and fp16; in fp32 another kernel" if layout.precision == "fp32" else ""),
            "PyTorch 2.13, derivatives.yaml",
        )
    ]
    if layout.precision == "fp8":
        rows.append(
            Difference(
                "products in 8 bits",
                "emulated: scaled and rounded to 8 bits, multiplied in more steps",
                "one scaled product, whose operands are of 8 bits: fewer operations and less "
                "that is temporary",
                "torchao, float8",
            )
        )
    if layout.compile:
        rows.append(
            Difference(
                "compiled blocks",
                "as eager ones",
                "fewer saved tensors and temporaries, by the compiler's choice",
                "not rehearsed",
            )
        )
    return rows
