"""A sampled continuation from a run's newest checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ridgeline.data.manifest import read_manifest
from ridgeline.data.tokenizer import load_tokenizer
from ridgeline.errors import CheckpointError, RunError, RunFolderError, TokenizerError
from ridgeline.model.decoder import Decoder
from ridgeline.run import read_run
from ridgeline.train import checkpoint
from ridgeline.train.build import MakeDecoder
from ridgeline.train.folder import checkpoints_of, latest_run_file
from ridgeline.train.manifest import newest
from ridgeline.train.resolve import this_host


def sample(
    folder: Path,
    prompt: str,
    *,
    tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    decoder: MakeDecoder = Decoder,
) -> str:
    """Continue `prompt` by at most `tokens` tokens with the newest checkpoint of a run folder.

    `temperature` 0 takes the likeliest token; `top_k` 0 keeps all. Raises CheckpointError when the
    folder has no checkpoint, TokenizerError when its data have no tokenizer.
    """
    if not (math.isfinite(temperature) and temperature >= 0 and top_k >= 0 and tokens >= 1):
        raise RunError(
            f"sampling {tokens} tokens at temperature {temperature}, top-k {top_k}",
            "tokens start at 1, temperature and top-k at 0",
            "--tokens 100 --temperature 0.8 --top-k 50",
        )
    if not (folder / "run.toml").is_file():
        raise RunFolderError(f"sampling from {folder}", "it is no run folder: no run.toml", "")
    run = read_run(latest_run_file(folder))
    path = newest(checkpoints_of(folder))
    if path is None:
        raise CheckpointError(
            f"sampling from {folder}", "it has no checkpoint yet", f"ridgeline train {folder}"
        )
    manifest = read_manifest(run.data.folder)
    if manifest.tokenizer is None:
        raise TokenizerError(
            f"sampling from {folder}", "its data have no tokenizer", "name one in data.tokenizer"
        )
    tokenizer = load_tokenizer(run.data.folder / manifest.tokenizer.file)
    model = decoder(run.model).to(this_host().device).eval()
    checkpoint.load(path, checkpoint.model_tensors(model))
    end = manifest.tokenizer.end_of_document
    ids = [end, *tokenizer.encode(prompt.encode(errors="replace").decode()).ids]
    generator = torch.Generator().manual_seed(seed % 2**63)
    for _ in range(tokens):
        logits_V = _next_logits(model, ids[-run.sequence :])
        if not logits_V.isfinite().all():
            raise CheckpointError(
                f"sampling from {path}", "its logits are not finite: the training diverged", ""
            )
        chosen = _choose(logits_V, temperature, top_k, generator)
        if chosen == end:
            break
        ids.append(chosen)
    text: str = tokenizer.decode(ids[1:])
    return text


@torch.no_grad()
def _next_logits(model: nn.Module, ids: list[int]) -> Tensor:
    device = next(model.parameters()).device
    logits_BLV: Tensor = model(torch.tensor([ids], device=device))
    return logits_BLV[0, -1].float().cpu()


def _choose(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k:
        kept = logits_V.topk(min(top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kept, float("-inf"))
    shares_V = torch.softmax(logits_V / temperature, dim=-1)
    return int(torch.multinomial(shares_V, 1, generator=generator))
