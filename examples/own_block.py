"""Train a block of one's own: attention and MLP side by side, as in GPT-J and PaLM.

    python examples/own_block.py examples/laptop.toml --budget.steps 100

The run file, its prepared data and the overrides are those of `ridgeline train`.
"""

from __future__ import annotations

import math
import sys
from typing import ClassVar

from torch import Tensor, nn

import ridgeline
from ridgeline.data.manifest import read_manifest
from ridgeline.model.decoder import MLP, Attention, Decoder, Rope, TensorRule, make_norm
from ridgeline.model.shape import ModelShape


class ParallelBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)): one norm, and two branches that need not wait."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm = make_norm(shape)
        self.attention = Attention(shape)
        self.mlp = MLP(shape, shape.ffn_hidden)

    def forward(self, x_BLD: Tensor, rope: Rope | None) -> Tensor:
        normed_BLD = self.norm(x_BLD)
        out_BLD: Tensor = x_BLD + self.attention(normed_BLD, rope) + self.mlp(normed_BLD)
        return out_BLD


class ParallelDecoder(Decoder):
    """The decoder with parallel blocks."""

    tensor_parallel: ClassVar[dict[str, TensorRule]] = {
        **Decoder.tensor_parallel,  # of embedding, attention, MLP and head
        "blocks.*.norm": "sequence",
    }

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        self.blocks = nn.ModuleDict({name: ParallelBlock(shape) for name in self.blocks})


def main(run_file: str, overrides: list[str]) -> None:
    """Train, and fail unless the model beats the frequencies of the tokens."""
    run = ridgeline.read_run(run_file, ["--name", "own-block", "--budget.steps", "60", *overrides])
    # What the run file demands after its own number of steps is not demanded of a shorter run.
    evaluation = run.evaluation.model_copy(update={"must_learn_nats": None})
    run = run.model_copy(update={"evaluation": evaluation})
    loss = ridgeline.train(run, decoder=ParallelDecoder).held_out_loss
    baselines = read_manifest(run.data.folder).baselines
    assert baselines is not None and loss is not None and math.isfinite(loss)
    print(f"held-out loss {loss:.3f}, unigram entropy {baselines.unigram_entropy:.3f}")
    assert loss < baselines.unigram_entropy, "it learnt nothing beyond the frequencies of tokens"


if __name__ == "__main__":  # worker processes import this file
    main(sys.argv[1] if len(sys.argv) > 1 else "examples/laptop.toml", sys.argv[2:])
