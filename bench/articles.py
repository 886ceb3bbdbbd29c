"""The articles that started this project, recomputed: each line is a claim and what it comes to.

`python bench/articles.py` prints docs/articles.md. What the articles print is quoted from
them; what is computed comes from the planner's own functions. A figure of ours that rests on a
number which nobody published says so in its remark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import ceil
from typing import NamedTuple

from ridgeline.layout.layout import Schedule
from ridgeline.layout.schedules import pipeline_schedule
from ridgeline.machine.device import device
from ridgeline.model.catalogue import entry
from ridgeline.model.counts import flops_per_token, parameters
from ridgeline.plan.cost import DAY, KWH, centre_capital, flops_6nd, training_s
from ridgeline.plan.goodput import HOUR, failures_per_device_hour, goodput, job_mtbf_s
from ridgeline.plan.timeline import even_durations, replay

FRONTIER_CARDS = 37_888
FRONTIER_GCDS = 75_264
GCD_BYTES = 64e9
GCD_PEAK = 191.5
"""TFLOP/s of one GCD in fp16, the denominator of the paper's percentages."""


AFTER_DECOMPOSITION = {"weight": 2, "gradient": 4, "master weight": 4, "momentum": 4}
"""Bytes per parameter that make 14 TB of a trillion, as a reviewer of the paper split them."""
RULE_OF_THUMB = {"float32 weight": 4, "gradient": 4, "Adam": 8, "activations and temporaries": 8}
"""Bytes per parameter that make 24 TB; the paper gives no split, this one is widely repeated."""


class Line(NamedTuple):
    """One claim: what it is about, as printed, recomputed, and what to know about it."""

    about: str
    printed: str
    computed: str
    remark: str = ""


def frontier() -> Iterator[Line]:
    """Frontier trains a trillion parameters (press, 2024; the paper is arXiv:2312.12705)."""
    yield Line(
        "3,072 of Frontier's cards",
        "a little over 8%",
        f"{3072 / FRONTIER_CARDS:.2%}",
        "of 37,888 cards of two GCDs; but each of the 3,072 was one GCD",
    )
    yield Line(
        "3,072 of its GCDs",
        "4% (article 2)",
        f"{3072 / FRONTIER_GCDS:.2%}",
        "of 75,264 in 9,408 nodes",
    )
    yield Line(
        "1,024 of its cards",
        "about 2.5%",
        f"{1024 / FRONTIER_CARDS:.2%}",
        f"not 2.5%; of the GCDs {1024 / FRONTIER_GCDS:.2%}",
    )
    for name, tflops, share in (("22B", 73.5, 38.38), ("175B", 69.2, 36.14), ("1T", 61.2, 31.96)):
        yield Line(
            f"{name}: {tflops} TFLOP/s",
            f"{share}% of peak",
            f"{100 * tflops / GCD_PEAK:.2f}%",
            f"of one GCD's {GCD_PEAK}; if recomputation is counted, as that code's counter "
            f"does, the MFU is {75 * tflops / GCD_PEAK:.1f}%",
        )
    yield Line(
        "memory of 1T parameters",
        "at least 14 TB",
        _terabytes(AFTER_DECOMPOSITION),
        f"{_split(AFTER_DECOMPOSITION)}; Adam's second moment, 4 more, makes "
        f"{_terabytes(AFTER_DECOMPOSITION | {'second moment': 4})}",
    )
    yield Line(
        "GCDs of 64 GB that hold 14 TB",
        "many",
        f"{ceil(14e12 / GCD_BYTES)}",
        "before any activation; one replica ran on 512 (8 tensor by 64 pipeline, recalled)",
    )
    yield Line(
        "bubble of 1T, strong scaling at 3,072",
        "87.05% left of ideal",
        f"{_bubble('1f1b', 64, 8016 // 6):.1%} idle",
        "of 8016/6 micro-batches over 64 stages (batch and layout recalled): the loss is mostly "
        "not the pipeline's",
    )
    seconds = training_s(flops_6nd(1e12, 20e12) * 4 / 3, 3072, 61.2e12)
    yield Line(
        "1T to the end, 20 T tokens, on those 3,072",
        "no time given",
        f"{seconds / DAY / 365.25:.0f} years",
        "6·N·D is 1.2e26; at 61.2 TFLOP/s with recomputation counted: it ran some steps",
    )
    yield from _gpt3()


def _gpt3() -> Iterator[Line]:
    shape = entry("gpt3-175b").shape
    flops = flops_per_token(shape, 2048, "full").total * 300e9
    yield Line(
        "FLOP of GPT-3 (175B, 300 B tokens)",
        "—",
        _power_of_ten(flops),
        f"6·N·D gives {_power_of_ten(flops_6nd(parameters(shape).non_embedding, 300e9))}",
    )
    for name, precision in (("A100-SXM-80GB", "bf16"), ("V100-SXM3-32GB", "fp16")):
        seconds = training_s(flops, 20_000, device(name).peak_flops[precision], 0.4)
        yield Line(
            f"a GPT-3 on 20,000 {name}",
            "ChatGPT used over 20,000",
            f"{seconds / DAY:.1f} days",
            "at an MFU of 0.4, assumed; so many devices are for answering, or for a larger model",
        )
    megatron = training_s(flops_6nd(175e9, 300e9) * 4 / 3, 1024, 140e12)
    yield Line(
        "the same on 1,024 A100",
        "34 days (arXiv:2104.04473)",
        f"{megatron / DAY:.1f} days",
        "8·N·D at 140 TFLOP/s: recomputation counted",
    )


def newsletter() -> Iterator[Line]:
    """A note on the same paper (newsletter)."""
    yield Line("3,072 of 75,264", "4%", f"{3072 / FRONTIER_GCDS:.1%}", "GCDs, counted rightly")
    yield Line("nodes behind 3,072 GCDs", "—", f"{3072 // 8}", "of 9,408; eight GCDs a node")
    yield Line(
        "exaFLOP/s of 3,072 GCDs at 61.2 TFLOP/s",
        "—",
        f"{3072 * 61.2e12 / 1e18:.3f}",
        "",
    )


def gigagpt() -> Iterator[Line]:
    """gigaGPT (Cerebras, 2023)."""
    shape = entry("gigagpt-175b").shape
    count = parameters(shape).total
    state = 16 * count
    yield Line("GPT-3's size", "over 100 billion", f"{count / 1e9:.1f} billion", "counted")
    yield Line(
        "nanoGPT's usual model",
        "about 100 million",
        f"{parameters(entry('gpt2').shape).total / 1e6:.1f} million",
        "GPT-2",
    )
    yield Line(
        "weights, gradients and Adam of it",
        "fits the system's memory",
        f"{state / 1e12:.2f} TB",
        f"16 B per parameter; a CS-2 has 40 GB on the wafer, {state / 40e9:.0f} times less, so "
        "weights stay in CPU nodes and stream",
    )
    flops = flops_per_token(shape, 2048, "causal").total * 300e9
    seconds = training_s(flops, 192, device("CS-2").peak_flops["fp16"])
    yield Line(
        "300 B tokens of it on 192 CS-2",
        "—",
        f"{seconds / DAY:.1f} days at peak",
        "no utilisation was published; the peak of 7,500 TFLOP/s is recalled",
    )


def llama_as_printed() -> Iterator[Line]:
    """What does it cost to train Llama 3.1 405B? As printed."""
    yield Line("share of embeddings", "2 of 405 billion, 0.49%", f"{2 / 405:.2%}", "")
    yield Line("6·N·D", "3.6e25", _power_of_ten(flops_6nd(405e9, 15e12), 3), "N = 405e9, D = 15e12")
    yield Line("16,000 H100 at 1,979 TFLOP/s", "3.2e19 FLOP/s", _power_of_ten(16_000 * 1979e12), "")
    seconds = 3.8e25 / 3.2e19
    yield Line(
        "3.8e25 FLOP over 3.2e19 FLOP/s",
        "1.48e6 s, 14 days",
        f"{_power_of_ten(seconds)} s, {seconds / DAY:.1f} days",
        f"a slip: 1.48e6 s would be {1.48e6 / DAY:.1f} days",
    )
    capital = centre_capital(16_000, 30_000, 0.5)
    yield Line("devices at 30,000 $", "480 M$", f"{16_000 * 30_000 / 1e6:.0f} M$", "")
    yield Line("capital", "960 M$", f"{capital / 1e6:.0f} M$", "half of it not devices")
    power_w = 16_000 * 1400.0
    yield Line(
        "power", "22.4 MW", f"{power_w / 1e6:.1f} MW", "1,400 W per device: 700 W, and as much"
    )
    kwh = power_w * 54 * DAY / KWH
    yield Line(
        "energy of 54 days",
        "29.03 million kWh",
        f"{kwh / 1e6:.2f} million kWh",
        f"the sentence says 42.5 days, which would be {power_w * 42.5 * DAY / KWH / 1e6:.2f}",
    )
    money = kwh * 0.083
    yield Line(
        "electricity at 0.083 per kWh",
        "2.41 million",
        f"{money / 1e6:.2f} million",
        "the price is in euro, the total in dollars",
    )
    yield Line(
        "its share of the cost of ownership", "0.25%", f"{money / (capital + money):.2%}", ""
    )


def llama_what_holds() -> Iterator[Line]:
    """What does it cost to train Llama 3.1 405B? What holds beside it."""
    shape = entry("llama3.1-405b").shape
    counts = parameters(shape)
    embeddings = counts.embedding + counts.head
    yield Line(
        "embedding and head",
        "0.49%",
        f"{embeddings / counts.total:.2%}",
        f"two matrices: {embeddings / 1e9:.2f} of {counts.total / 1e9:.2f} billion",
    )
    flops = flops_per_token(shape, 8192, "causal").total * 15e12
    paper = _power_of_ten(flops_6nd(405e9, 15.6e12))
    yield Line(
        "FLOP of 15 T tokens, counted",
        "3.8e25 reported",
        _power_of_ten(flops),
        f"causal attention over 8,192; 6·405e9·15.6e12 = {paper} too",
    )
    peak = device("H100-SXM-80GB").peak_flops["bf16"]
    dense = training_s(3.8e25, 16_000, peak)
    yield Line(
        "days at the dense peak",
        "13.7",
        f"{dense / DAY:.1f}",
        "1,979 TFLOP/s counts sparsity, which training does not have; dense is 989",
    )
    days = [training_s(3.8e25, 16_000, peak, mfu) / DAY for mfu in (0.43, 0.38)]
    yield Line("days at an MFU of 43 to 38%", "54", f"{days[0]:.0f} to {days[1]:.0f}", "")
    yield Line(
        "days by the model card",
        "—",
        f"{30.84e6 / 16_384 / 24:.0f}",
        "30.84 M GPU-hours on 16,384; "
        f"an average of {3.8e25 / (30.84e6 * HOUR) / 1e12:.0f} TFLOP/s, MFU "
        f"{3.8e25 / (30.84e6 * HOUR) / peak:.1%}",
    )
    yield Line(
        "MFU that 54 days would mean",
        "38 to 43%",
        f"{training_s(3.8e25, 16_000, peak) / (54 * DAY):.1%}",
        "so 54 days is not the training: it is the snapshot in which faults were counted",
    )
    energy = 1400 * 30.84e6 * HOUR
    yield Line(
        "energy by the card's hours",
        "29.03 GWh",
        f"{energy / KWH / 1e6:.2f} GWh",
        f"at the article's 1,400 W; electricity {energy / KWH * 0.083 / 1e6:.2f} million",
    )
    mtbf_s = job_mtbf_s(failures_per_device_hour(419, 16_384, 54 * DAY), 16_384)
    yield Line(
        "hours between failures",
        "419 in 54 days",
        f"{mtbf_s / HOUR:.2f}",
        f"goodput {goodput(mtbf_s, 10, 600).fraction:.1%} if a checkpoint blocks 10 s and a "
        "restart takes 10 minutes (both assumed); the paper says over 90%",
    )
    yield Line(
        "H100 that hold weights, gradients and Adam",
        "hundreds or thousands",
        f"{ceil(16 * counts.total / 80e9)}",
        f"16 B per parameter, {16 * counts.total / 1e12:.1f} TB: speed asks for thousands",
    )


def supercomputers() -> Iterator[Line]:
    """Supercomputers training large models (Chinese press, 2024), with Fugaku-LLM."""
    yield Line(
        "memory of 1T parameters",
        "at least 24 TB",
        _terabytes(RULE_OF_THUMB),
        f"{_split(RULE_OF_THUMB)}: the usual rule of thumb; the paper gives no split, so this "
        "reading is ours",
    )
    yield Line(
        "the same after decomposition",
        "14 TB",
        _terabytes(AFTER_DECOMPOSITION),
        "article 1; dividing a model spreads its bytes and removes none: two ways of counting",
    )
    yield Line(
        "GCDs of 64 GB that hold 24 TB", "—", f"{24e12 / GCD_BYTES:.0f}", "of the 3,072 in use"
    )
    shape = entry("fugaku-llm-13b").shape
    counts = parameters(shape)
    yield Line(
        "parameters of Fugaku-LLM", "13 billion", f"{counts.total / 1e9:.2f} billion", "counted"
    )
    yield Line(
        "13,824 nodes of Fugaku",
        "—",
        f"{13_824 / 158_976:.1%}",
        f"of 158,976; {6 * 8 * 288:,} = 6 tensor by 8 pipeline by 288 data",
    )
    yield Line(
        "tokens per parameter",
        "38 million tokens",
        f"{380e9 / counts.total:.1f}",
        f"of the 380 billion it was; 38 million would be {38e6 / counts.total:.4f}: a slip of "
        "10,000",
    )
    flops = flops_per_token(shape, 2048, "causal").total * 380e9
    seconds = training_s(flops, 13_824, device("A64FX").peak_flops["fp32"])
    yield Line(
        "days at the peak of float32",
        "—",
        f"{seconds / DAY:.1f}",
        f"{_power_of_ten(flops)} FLOP; the time it took was not published, so its MFU is a dash",
    )
    yield Line(
        "idle share of its pipeline",
        "not a scrap wasted",
        f"{_bubble('1f1b', 8, 2016 // 288):.1%}",
        "its public script has 7 micro-batches over 8 stages",
    )
    yield Line(
        "the same with ZB-H1",
        "—",
        f"{_bubble('zbh1', 8, 7):.1%}",
        "if forward and both backward parts take equal time",
    )
    yield Line(
        "the same with 8 micro-batches and 5 chunks a rank",
        "—",
        f"{_bubble('1f1b', 8, 8, 5):.1%}",
        "a batch of 2,304, the script's other choice; one layer per chunk",
    )


def _terabytes(bytes_per_parameter: dict[str, int]) -> str:
    """Of a trillion parameters."""
    return f"{sum(bytes_per_parameter.values()) * 1e12 / 1e12:.0f} TB"


def _split(bytes_per_parameter: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {size}" for name, size in bytes_per_parameter.items())
    return f"{sum(bytes_per_parameter.values())} B per parameter: {parts}"


def _power_of_ten(value: float, digits: int = 2) -> str:
    """3.645e25, as people write it."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@cache
def _bubble(name: Schedule, pipeline: int, micro_batches: int, interleave: int = 1) -> float:
    """Idle share of a step, replayed, for equal chunks and forward, I and W of equal time."""
    schedule = pipeline_schedule(name, pipeline, micro_batches, interleave)
    timeline = replay(schedule, even_durations(schedule.chunks, 1, 1, 1))
    return timeline.bubble_s[0] / timeline.step_s


Article = Callable[[], Iterator[Line]]
ARTICLES: tuple[Article, ...] = (
    frontier,
    newsletter,
    gigagpt,
    llama_as_printed,
    llama_what_holds,
    supercomputers,
)


def markdown() -> str:
    """docs/articles.md."""
    parts = [
        "# The articles, recomputed",
        "What the articles print, and what it comes to by this planner's functions. "
        "`python bench/articles.py` prints this page, and a test compares the two. "
        "A dash: not printed, or not known. Not arithmetic, so not here: benchmark scores, "
        "scaling efficiencies without their base, and what a company says it uses.",
    ]
    for article in ARTICLES:
        title = (article.__doc__ or "").rstrip(".")
        rows = [f"| {' | '.join(line)} |" for line in article()]
        parts.append("\n".join([f"## {title}", "", HEADING, "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


HEADING = "| what | as printed | recomputed | remark |"

if __name__ == "__main__":
    print(markdown(), end="")
