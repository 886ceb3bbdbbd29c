"""The table of names to rules: what tensor parallelism refuses before any process starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from ridgeline.errors import LayoutError
from ridgeline.launch.pool import Pool
from ridgeline.model.decoder import Decoder, TensorRule
from ridgeline.model.shape import ModelShape
from ridgeline.run import Run
from ridgeline.train.parity import parity
from ridgeline.train.start import train
from ridgeline.train.tensor import rules_of

MakeRun = Callable[..., Run]


class Plain(nn.Module):
    """A decoder of one's own that says nothing of how it could be divided."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocab)

    def forward(self, tokens_BL: Tensor, positions_L: Tensor | None = None) -> Tensor:
        logits_BLV: Tensor = self.head(self.embedding(tokens_BL))
        return logits_BLV


class Forgetful(Decoder):
    """Its table misses the last norm."""

    tensor_parallel: ClassVar[dict[str, TensorRule]] = {
        name: rule for name, rule in Decoder.tensor_parallel.items() if name != "norm"
    }


class Misspelt(Decoder):
    """One of its rules is none."""

    tensor_parallel: ClassVar[dict[str, TensorRule]] = {
        **Decoder.tensor_parallel,
        "blocks.*.up": "column",  # type: ignore[dict-item]
    }


class NoProcess(Pool):
    """Nothing may be started."""

    def run(self, *_: object) -> list[object]:
        raise AssertionError("a process was started")


REFUSED = [
    (
        Plain,
        "tp2 mb4 fp32",
        "tp2 for a Plain",
        "needs a class attribute `tensor_parallel`",
        'tp1, or tensor_parallel = {"blocks.*.mlp.up": "columns", …}',
    ),
    (
        Forgetful,
        "tp2 mb4 fp32",
        "tp2 for a Forgetful",
        "no rule of its `tensor_parallel` divides or copies norm.weight",
        'a rule such as "norm": "sequence"',
    ),
    (
        Misspelt,
        "tp2 mb4 fp32",
        "rule 'column' of a `tensor_parallel` table",
        "rules are vocabulary, positions,",
        "did you mean 'columns'?",
    ),
    (
        Plain,
        "pp2 mb4 fp32",
        "pp2 for a Plain",
        "a pipeline is cut between the blocks",
        "pp1, or a decoder with these attributes",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0].__name__} {case[1][:3]}")
def test_a_decoder_that_cannot_be_divided_is_refused_before_any_process_starts(
    case: tuple[Callable[[ModelShape], nn.Module], str, str, str, str], tiny_run: MakeRun
) -> None:
    decoder, layout, asked, rule, remedy = case
    with pytest.raises(LayoutError) as in_parity:
        parity(tiny_run(), (layout,), decoder=decoder, pool=NoProcess())
    run = tiny_run(layout=layout)
    with pytest.raises(LayoutError) as in_training:
        train(run, decoder=decoder)
    for error in (in_parity.value, in_training.value):
        assert error.asked == asked
        assert rule in error.rule
        assert error.remedy == remedy
    assert not run.path.exists()


def test_every_parameter_of_every_kind_of_decoder_has_a_rule() -> None:
    experts = {"count": 4, "top_k": 2, "ffn_hidden": 32, "shared": 1, "first_dense_layers": 1}
    for changes in (
        {"positions": "learned", "norm": "layernorm", "activation": "gelu", "bias": True},
        {"qk_norm": True, "qkv_bias": True, "tied": True, "experts": experts},
    ):
        values = {"layers": 2, "hidden": 32, "heads": 4, "vocab": 40, **changes}
        with torch.device("meta"):
            model = Decoder(ModelShape.model_validate(values))
        ruled = rules_of(model, 2)
        parameters = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
        assert parameters <= set(ruled)
