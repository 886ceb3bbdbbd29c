"""Memory of one chunk of a layout: what Ridgeline's own program keeps, and a backward pass takes.

A block's backward pass is written down as the order in which its tensors come and go; of all
moments between, of the loss and of the data-parallel engine's reductions the fullest counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ridgeline.layout.stages import Chunk
from ridgeline.plan.program import REDUCED, Program, Unit
from ridgeline.plan.quantities import LOSS_CHUNK_TOKENS

WIDE = 4.0
"""Bytes per element of what is computed in float32 whatever the precision."""
MOMENTS = 2
"""Of AdamW, each of them float32 as the master weight."""

Sizes = Mapping[str, float]


@dataclass
class Held:
    """Bytes by component, as a pass goes on; `most` is the fullest moment so far."""

    now: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    names: dict[str, tuple[str, float]] = field(default_factory=dict)

    def hold(self, owner: str, size: float) -> None:
        """So much more, or less."""
        self.now[owner] += round(size)
        if size > 0 and self.now.total() > self.most.total():
            self.most = self.now.copy()

    def follow(self, script: str, sizes: Sizes) -> None:
        """`+x` is born, temporary; `-x` dies, whoever owns it, if it is there."""
        for word in script.split():
            sign, name = word[0], word[1:]
            if sign == "+":
                self.keep("temporary", name, sizes[name])
            elif name in self.names:
                owner, size = self.names.pop(name)
                self.hold(owner, -size)

    def keep(self, owner: str, name: str, size: float) -> None:
        """A tensor that is called by its name."""
        self.names[name] = (owner, size)
        self.hold(owner, size)


@dataclass(frozen=True)
class Block:
    """The tensors of one block and micro-batch: their sizes, and which are kept."""

    sizes: dict[str, float]
    kept: tuple[str, ...]
    """From forward to backward."""
    again: tuple[str, ...]
    """What backward makes again before it begins."""
    gone: tuple[str, ...]
    """Of what is kept, what only making those needed."""
    backward: str
    units: tuple[Unit, ...]

    @property
    def halves(self) -> tuple[str, ...]:
        """Gradients that the weights' half of a split backward pass needs."""
        several = ("g", "E") if "+g" in self.backward else ("dx", "D", "S", "S2")
        return ("du", "dt", "dq", "dk", "dv", *several)

    @property
    def half_bytes(self) -> float:
        """Of them, of one micro-batch."""
        words = self.backward.split()
        sizes = self.sizes | {"dx": self.sizes["x"]}
        return sum(sizes[w[1:]] for w in words if w[0] == "-" and w[1:] in self.halves)

    @property
    def kept_bytes(self) -> float:
        """Of one micro-batch."""
        return sum(self.sizes[name] for name in self.kept)


def block_of(program: Program, layer: int) -> Block:
    """Block `layer` of `program`."""
    shape, layout, width = program.shape, program.layout, program.width
    tensor, rows, experts = layout.tensor, program.rows, shape.experts_at(layer)
    queries, keys = program.attention_widths()
    hidden, several = width * rows * shape.hidden, tensor > 1
    residual = hidden / tensor
    sizes = {
        "x": residual, "n": hidden, "q": width * rows * queries, "k": width * rows * keys,
        "v": width * rows * keys, "o": width * rows * queries, "O": width * rows * queries,
        "lse": WIDE * rows * shape.heads / tensor, "m": hidden, "r": residual, "y": residual,
        "N": hidden, "g": hidden, "D": residual, "E": residual,
    }  # fmt: skip
    rotated = shape.positions == "rope"
    before = ("q0", "k0") if rotated or shape.qk_norm else ()
    sizes |= {"q0": sizes["q"], "k0": sizes["k"]}
    # a gradient turned back, and its float32 copies where it has fewer digits
    sizes["turn"] = (5 if width < WIDE else 2) * width * rows * queries
    units = tuple(program.units(layer))
    for weight in (each for unit in units for each in unit.weights):
        sizes[f"W_{weight.name}"] = width * weight.size
    attention = ["n", "q", "k", "v", "o", "lse"]
    if shape.qk_norm:
        attention += ["q0", "k0"]
    if program.context is not None:
        attention.append("O")
        copied = keys * max(1, layout.context // max(shape.kv_heads // tensor, 1))
        if program.context == "heads":
            sizes |= {"k": width * rows * copied, "v": width * rows * copied}
    mlp, inner, mlp_backward = _mlp(program, layer, sizes)
    whole = ["x", *attention, "y", *mlp]
    kept, again, gone = whole, [], []
    if layout.recompute == "full":
        kept, again = ["x"], whole[1:]
    elif layout.recompute == "selective":
        products = ["x", "n", "v", "m", "r", "N", "d", "s2"] if several else ["x", "v", "m", "d"]
        products += list(before) or ["q", "k"]
        products += [name for name in inner if name in mlp]
        if experts is not None:
            products = [each for each in products if each not in ("N", "d", "s2")] + ["router"]
        kept = [each for each in products if each in sizes]
        again = [name for name in whole if name not in kept]
        gone = ["m", *(() if shape.qk_norm else before)]
    turn = "+turn -turn" if rotated else ""
    gather, scatter = ("+g", "+E -S") if several else ("", "")
    attention_backward = (
        f"{gather} +W_out +do -g +dq +dk +dv -do -O -q -k -v -o -lse {turn} "
        "+W_v +na -dv +W_k +nb -dk +S -na -nb +W_q +nc -dq -n +S2 -S -nc "
        f"{scatter.replace('S', 'S2')} +e -E -S2 -x +D2 -D -e"
    )
    sizes |= {
        "do": sizes["o"], "dq": sizes["q"], "dk": sizes["k"], "dv": sizes["v"], "na": hidden,
        "nb": hidden, "nc": hidden, "S": hidden, "S2": hidden, "e": residual, "D2": residual,
    }  # fmt: skip
    return Block(
        sizes, tuple(kept), tuple(again), tuple(gone), f"{mlp_backward} {attention_backward}", units
    )


def _mlp(
    program: Program, layer: int, sizes: dict[str, float]
) -> tuple[list[str], tuple[str, ...], str]:
    """What the MLP keeps, its inner products' outputs, and its backward pass."""
    shape, tensor, width = program.shape, program.layout.tensor, program.width
    experts, hidden = shape.experts_at(layer), sizes["n"]
    gated = shape.activation == "swiglu"
    if experts is not None:
        return _experts(program, layer, sizes)
    inner = width * program.rows * shape.ffn_hidden / tensor
    sizes |= dict.fromkeys(("u", "t", "s", "p", "du", "dt", "ds", "dp"), inner)
    sizes |= {"d": hidden, "s2": sizes["x"], "a": hidden, "b": hidden, "S": hidden}
    gather, scatter = ("+g", "+E -S") if tensor > 1 else ("", "")
    last = f"-N {{}} {scatter} +e -E -S -y +D -dx -e"
    if gated:
        return (
            ["N", "u", "t", "s", "p"],
            ("u", "t"),
            f"{gather} +W_down +dp -p -g +du +ds -dp -s -u +dt -ds -t +W_gate +a -dt +W_up +b -du "
            + last.format("+S -a -b"),
        )
    return (
        ["N", "u", "p"],
        ("u",),
        f"{gather} +W_down +dp -p -g +du -dp -u +W_up +S -du " + last.format(""),
    )


def _experts(
    program: Program, layer: int, sizes: dict[str, float]
) -> tuple[list[str], tuple[str, ...], str]:
    """A mixture of experts: the router's float32 copy of its input, the visits, their results."""
    shape, width = program.shape, program.width
    experts = shape.experts_at(layer)
    assert experts is not None
    spread = program.layout.expert > 1
    tokens = program.rows / program.layout.tensor
    visits = tokens * experts.top_k
    rows, inner = width * visits * shape.hidden, width * visits * experts.ffn_hidden
    sizes |= dict.fromkeys(("u", "t", "s", "p", "du", "dt", "ds", "dp"), inner)
    sizes |= dict.fromkeys(("i", "j", "z", "c", "f", "a", "b", "S"), rows)
    wide = WIDE * tokens * shape.hidden
    sizes |= {"N": sizes["x"], "w": wide, "dw": wide, "mul": 2 * WIDE * visits * shape.hidden}
    sizes |= {"h": wide, "router": width * 0 + WIDE * tokens * experts.count, "E": sizes["x"]}
    kept = ["w", "i", "u", "t", "s", "p", "z"]
    gated = shape.activation == "swiglu"
    if not gated:
        kept = [name for name in kept if name not in "ts"]
    back = "+mul +f -mul -z +c -f"
    middle = (
        "+W_experts.down +dp -c -p +du +ds -dp -u -s +dt -ds -t +W_experts.gate +a -dt "
        "+W_experts.up +b -du -i +S -a -b"
        if gated
        else "+W_experts.down +dp -c -p +du -dp -u +W_experts.up +S -du -i"
    )
    ready = "!" if spread else ""
    script = f"{back} {middle} {ready} +E -S +dw -w -dw +e -E -y +D -dx -e"
    return kept, ("router",), script


class Work:
    """One chunk: what it holds, and what a backward pass of it takes beside."""

    def __init__(self, program: Program, chunk: Chunk) -> None:
        self.program, self.chunk = program, chunk
        self.root = program.root(chunk)
        experts = program.shape.experts_at
        kinds = {experts(layer) is not None: layer for layer in chunk.layers}
        known = {kind: block_of(program, layer) for kind, layer in kinds.items()}
        self.blocks = [known[experts(layer) is not None] for layer in chunk.layers]
        self.units = [self.root, *(unit for block in self.blocks for unit in block.units)]
        self.residual = program.width * program.rows * program.shape.hidden / program.layout.tensor
        self.logits = program.width * program.rows * program.shape.vocab / program.layout.tensor
        self._passes: dict[tuple[str, bool, bool], Counter[str]] = {}

    @cached_property
    def resting(self) -> Counter[str]:
        """Bytes of parameters, as they rest and as they are gathered, with the moments."""
        own = sum(unit.padded / unit.shards for unit in self.units)
        held = Counter(optimizer=round((1 + MOMENTS) * WIDE * own))
        if self.program.layout.zero < 3:
            held["weights"] = round(self.program.width * sum(unit.size for unit in self.units))
        return held

    @cached_property
    def gradients(self) -> float:
        """Bytes of gradients, once there are any."""
        sharded = self.program.layout.zero >= 2
        return REDUCED * sum(unit.padded / (unit.shards if sharded else 1) for unit in self.units)

    @cached_property
    def kept(self) -> float:
        """Bytes that a micro-batch keeps from forward to backward."""
        program = self.program
        size = sum(block.kept_bytes for block in self.blocks)
        if program.shape.positions == "rope":
            tokens = program.rows / program.layout.micro_batch
            size += 2 * WIDE * tokens * program.shape.head_dim
        if self.chunk.last:
            size += self.residual * (1 + program.layout.tensor) + self.logits
        return size

    @cached_property
    def halved(self) -> Counter[str]:
        """Bytes more between the two halves of a backward pass."""
        size = sum(block.half_bytes for block in self.blocks)
        last = self.chunk.last
        more = size + (self.logits + self.residual) * last
        return Counter(activations=-round(self.logits * last), temporary=round(more))

    def backward(self, kind: str, more: bool, last: bool) -> Counter[str]:
        """Bytes more at the fullest moment of a backward pass, or of its half for the input (I).

        `more`: earlier micro-batches left gradients; `last`: no later one follows.
        """
        key = (kind, more, last)
        if key not in self._passes:
            zero, halved, held = self.program.layout.zero, kind == "I", Held()
            reduces = (zero >= 2 or last) and not halved
            pass_ = _Pass(self.program, held, reduces, more, last, halved)
            if zero >= 2 and more:
                pass_.waiting = REDUCED * self.root.padded  # of the micro-batch before
                held.hold("temporary", pass_.waiting)
            self._head(pass_)
            for place in reversed(range(len(self.blocks))):
                pass_.block(self.blocks[place], self.blocks[place - 1] if place else None)
            if not halved:
                self._embedding(pass_)
            self._passes[key] = held.most
        return self._passes[key]

    def _head(self, pass_: _Pass) -> None:
        """The loss, in chunks of float32, and the product behind it."""
        program, held, zero = self.program, pass_.held, self.program.layout.zero
        residual, root, chunk = self.residual, self.root, self.chunk
        sizes = {"dx": residual, "root": program.width * root.size}
        if chunk.last:
            vocab = program.shape.vocab / program.layout.tensor
            rows = program.rows
            part = WIDE * min(rows, LOSS_CHUNK_TOKENS) * vocab
            copies = (rows > LOSS_CHUNK_TOKENS) + (1 if program.width == WIDE else 2)
            sizes |= {"dl": self.logits, "part": copies * part}
            sizes |= {"W_head": program.width * vocab * program.shape.hidden}
            sizes |= {"g": residual * program.layout.tensor}
            held.follow("+dl +part -part", sizes)
            held.hold("activations", -self.logits)
            held.follow("+root" if zero == 3 else "", sizes)
            if pass_.halved:
                held.follow("+g +E +dx -g", sizes | {"E": residual})
                return
            held.follow("+W_head +g -dl", sizes)
            held.hold("activations", -sizes["g"] - residual)
            held.follow("+dx -g", sizes)
        else:
            held.follow("+dx" + (" +root" if zero == 3 else ""), sizes)

    def _embedding(self, pass_: _Pass) -> None:
        """What lies in no block: its gradients, and their reduction."""
        program, held, chunk = self.program, pass_.held, self.chunk
        if chunk.first:
            vocab = program.shape.vocab / program.layout.tensor
            gathered = program.width * program.rows * program.shape.hidden
            sizes = {"g": gathered, "W_embedding": program.width * vocab * program.shape.hidden}
            held.follow("+g +W_embedding -g -dx", sizes)
            if chunk.last and program.shape.tied:  # both gradients are added up in a third
                held.follow("+W_tied -W_head -W_embedding", {"W_tied": sizes["W_embedding"]})
                held.names["W_embedding"] = held.names.pop("W_tied")
        held.follow("-root", {})
        pass_.reduce(self.root)


class _Pass:
    """One backward pass through a chunk."""

    def __init__(
        self, program: Program, held: Held, reduces: bool, more: bool, last: bool, halved: bool
    ) -> None:
        self.program, self.held, self.reduces, self.more = program, held, reduces, more
        self.last, self.halved = last, halved
        self.waiting = 0.0
        """Bytes of the last reduction's input, which is given back with the next."""

    def block(self, block: Block, before: Block | None) -> None:
        """A block, and its reduction; ZeRO-3 gathers it, and the one before."""
        held, width = self.held, self.program.width
        sizes = dict(block.sizes) | {"dx": block.sizes["x"]}
        three = self.program.layout.zero == 3
        if three:
            sizes["weights"] = width * sum(unit.size for unit in block.units)
            held.follow("+weights", sizes)
            if len(block.units) > 1:  # experts are gathered apart, behind what is gathered first
                sizes["next"] = width * block.units[1].padded
                held.follow("+next", sizes)
            elif before is not None:
                sizes["next"] = width * before.units[0].padded
                held.follow("+next", sizes)
        for name in block.kept:
            held.names[name] = ("activations", sizes[name])
        for name in block.again:
            held.keep("temporary", name, sizes[name])
        held.follow(" ".join(f"-{name}" for name in block.gone), sizes)
        if three and len(block.units) > 1:
            held.follow("+a +b -a -b" if block.again else "", sizes)
            held.follow("-next", sizes)
            if before is not None:
                sizes["next"] = width * before.units[0].padded
                held.follow("+next", sizes)
        if self.halved:
            self._input_half(block, sizes)
            return
        first, _, rest = block.backward.partition("!")
        held.follow(first, sizes)
        if rest:
            self.reduce(block.units[1])
            held.follow(rest, sizes)
        held.names["dx"] = held.names.pop("D2")
        for name in block.kept:
            held.follow(f"-{name}", sizes)
        held.follow("-weights -next", sizes)
        self.reduce(block.units[0])

    def _input_half(self, block: Block, sizes: Sizes) -> None:
        """The gradient of a block's input alone; what the weights' need stays."""
        held = self.held
        for word in block.backward.replace("!", "").split():
            name = word[1:]
            if name.startswith("W_") or (word[0] == "-" and name in (*block.kept, *block.again)):
                continue
            if word[0] == "-" and name in block.halves:
                held.names.pop(name)
                continue
            held.follow(word, sizes)
        held.names["dx"] = held.names.pop("D2")

    def reduce(self, unit: Unit) -> None:
        """A unit's gradients join those of earlier micro-batches, or all go to their shards."""
        held = self.held
        if not self.reduces:
            for weight in unit.weights:
                if not self.more:
                    held.hold("gradients", REDUCED * weight.size)
                held.follow(f"-W_{weight.name}", {})
            return
        zero, born = self.program.layout.zero, " ".join(f"-W_{each.name}" for each in unit.weights)
        kept = self.more and zero < 2
        if kept:
            held.follow(born, {})
        if self.last and zero < 3:
            held.hold("weights", -self.program.width * unit.size)
        held.hold("temporary", -self.waiting)
        self.waiting = REDUCED * unit.padded
        held.hold("temporary", self.waiting)
        held.follow(born, {})
        out = REDUCED * unit.padded / unit.shards
        if unit.shards == 1:  # nothing is scattered: the sum is a copy, made before all else goes
            held.hold("temporary", out)
        if kept:
            held.hold("gradients", -REDUCED * unit.size)
        if unit.shards > 1:
            held.hold("temporary", out)
        held.hold("temporary", -out)
        if not self.more or zero < 2:
            held.hold("gradients", out)
