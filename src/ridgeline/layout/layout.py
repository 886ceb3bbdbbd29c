"""Layout: how a run is divided over devices, said in one sentence.

    dp48 tp8 pp8 mb1 v2 1f1b zero1 selective bf16

Words come in any order; what equals its default is left out when printed. The product of the four
mesh axes is the world: dp·cp·tp·pp. `ep` divides dp·cp and never multiplies it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ridgeline.errors import LayoutError, nearest

Schedule = Literal["1f1b", "gpipe", "zbh1", "izb", "zbv", "dualpipev"]
Recompute = Literal["none", "selective", "full"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "fp8"]
Axis = Literal["pipeline", "data", "context", "tensor"]

AXIS_WORDS: dict[Axis, str] = {"pipeline": "pp", "data": "dp", "context": "cp", "tensor": "tp"}
COUNT_WORDS = {
    "dp": "data",
    "cp": "context",
    "tp": "tensor",
    "pp": "pipeline",
    "ep": "expert",
    "etp": "expert_tensor",
    "mb": "micro_batch",
    "v": "interleave",
}
EXAMPLE = "dp48 tp8 pp8 mb1 v2 1f1b zero1 selective bf16"
Count = Annotated[int, Field(ge=1)]


def _axes_from_words(value: object) -> object:
    """'pp-dp-cp-tp' and ["pp", "dp", …] name axes by their words; full names pass through."""
    words = value.split("-") if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        return value
    names = {word: axis for axis, word in AXIS_WORDS.items()}
    return tuple(names.get(word, word) for word in words)


class Layout(BaseModel):
    """A layout: sizes of the mesh axes, micro-batch, pipeline schedule, ZeRO, recompute, precision.

    Raises LayoutError for a sentence that cannot be parsed and for sizes that contradict each
    other. What also needs the model or the batch is checked in `layout.arithmetic`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Count = 1
    """Data-parallel replicas (`dp`)."""
    context: Count = 1
    """Context-parallel parts of a sequence (`cp`)."""
    tensor: Count = 1
    """Tensor-parallel parts of a layer, with sequence parallel (`tp`)."""
    pipeline: Count = 1
    """Pipeline stages, without interleaving (`pp`)."""
    expert: Count = 1
    """Expert-parallel groups; divides data·context (`ep`)."""
    expert_tensor: Count = 1
    """Tensor-parallel parts inside an expert (`etp`)."""
    micro_batch: Count = 1
    """Sequences per micro-batch and replica (`mb`)."""
    interleave: Count = 1
    """Model chunks per pipeline rank (`v`)."""
    schedule: Schedule = "1f1b"
    """Order of the pipeline's work; 1f1b with v > 1 is interleaved 1F1B."""
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage on FSDP2: 0 replicates; 1 shards optimizer state and reduces once per step;
    2 reduces per micro-batch; 3 also reshards parameters after forward."""
    shard_group: Annotated[int, Field(ge=0)] = 0
    """Devices a ZeRO shard spans (`zero3/16`); 0: all of data·context."""
    recompute: Recompute = "none"
    """What backward computes again instead of keeping it."""
    precision: Precision = "auto"
    """Number format of the matrix products; auto: the fastest the device multiplies natively."""
    compile: bool = False
    """Whether each block is compiled (`compile`)."""
    order: Annotated[tuple[Axis, Axis, Axis, Axis], BeforeValidator(_axes_from_words)] = (
        "pipeline",
        "data",
        "context",
        "tensor",
    )
    """Mesh axes from outermost to innermost; innermost neighbours share a node (`pp-dp-cp-tp`)."""

    @property
    def world(self) -> int:
        """Devices of the whole run: dp·cp·tp·pp."""
        return self.data * self.context * self.tensor * self.pipeline

    @model_validator(mode="before")
    @classmethod
    def _from_sentence(cls, value: Any) -> Any:
        return words_of(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Layout:
        if sorted(self.order) != sorted(get_args(Axis)):
            raise LayoutError(
                f"layout order {'-'.join(self.order)}",
                "each of the axes pp, dp, cp, tp stands in the order exactly once",
                "pp-dp-cp-tp",
            )
        replicas = self.data * self.context
        if replicas % self.expert:
            fits = _divisor_below(replicas, self.expert)
            raise LayoutError(
                f"ep{self.expert} in {self}",
                f"ep divides dp·cp: {self.data}·{self.context} = {replicas} is not a multiple of "
                f"{self.expert}",
                f"ep{fits}",
            )
        if self.shard_group and (self.zero == 0 or replicas % self.shard_group):
            fits = _divisor_below(replicas, self.shard_group)
            raise LayoutError(
                f"zero{self.zero}/{self.shard_group}",
                f"a shard group needs zero1 to zero3 and divides dp·cp = {replicas}",
                f"zero{self.zero or 3}/{fits}",
            )
        if self.interleave > 1 and self.pipeline == 1:
            raise LayoutError(
                f"v{self.interleave} with pp1",
                "interleaving gives each pipeline rank several chunks; it needs pp of 2 or more",
                f"pp2 v{self.interleave}, or leave v out",
            )
        return self

    def __str__(self) -> str:
        """The layout's sentence; `Layout.model_validate(str(layout)) == layout`."""
        counts = [
            f"{word}{getattr(self, field)}"
            for word, field in COUNT_WORDS.items()
            if getattr(self, field) != 1
        ]
        fields = type(self).model_fields
        words = [
            str(getattr(self, name))
            for name in ("schedule", "recompute", "precision")
            if getattr(self, name) != fields[name].default
        ]
        if self.zero:
            words.insert(0, f"zero{self.zero}" + f"/{self.shard_group}" * bool(self.shard_group))
        if self.compile:
            words.append("compile")
        if self.order != fields["order"].default:
            words.append("-".join(AXIS_WORDS[axis] for axis in self.order))
        return " ".join(counts + words) or "dp1"


def words_of(sentence: str) -> dict[str, Any]:
    """The fields a layout sentence names. Raises LayoutError for an unknown or repeated word."""
    fields: dict[str, Any] = {}
    for word in sentence.split():
        for name, value in _meaning(word, sentence).items():
            if name in fields:
                raise LayoutError(
                    f"layout {sentence!r} says {name} twice", "each word once", EXAMPLE
                )
            fields[name] = value
    return fields


def _meaning(word: str, sentence: str) -> dict[str, Any]:
    if match := re.fullmatch(r"(dp|cp|tp|pp|ep|etp|mb|v)(\d{1,9})", word):
        if int(match[2]) < 1:
            raise LayoutError(f"{word} in layout {sentence!r}", "sizes start at 1", f"{match[1]}1")
        return {COUNT_WORDS[match[1]]: int(match[2])}
    if match := re.fullmatch(r"zero([0-3])(?:/(\d{1,9}))?", word):
        group = {"shard_group": int(match[2])} if match[2] else {}
        return {"zero": int(match[1])} | group
    choices = {"schedule": Schedule, "recompute": Recompute, "precision": Precision}
    for name, values in choices.items():
        if word in get_args(values):
            return {name: word}
    if word == "compile":
        return {"compile": True}
    if re.fullmatch(r"(pp|dp|cp|tp)(-(pp|dp|cp|tp)){3}", word):
        return {"order": word}
    known = ["dp1", "cp1", "tp1", "pp1", "ep1", "mb1", "v2", "zero1", "compile", "pp-dp-cp-tp"]
    known += [*get_args(Schedule), *get_args(Recompute), *get_args(Precision)]
    raise LayoutError(
        f"{word!r} in layout {sentence!r}",
        "a layout is words such as " + EXAMPLE,
        nearest(word, known),
    )


def _divisor_below(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)
