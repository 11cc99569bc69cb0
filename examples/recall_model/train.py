# SPDX-License-Identifier: Apache-2.0
"""Trains the recall model on one GPU: `python train.py --out DIR`, or with `--latent` the one of
../recall_model_mla.

Two losses on the tokens of the answer:

- *recall*: next number of the chain, prompt whole;
- *fault*: `?` wherever the pair that a step looks up lies in KV that a fault struck (faults.py).

The second is the point. A transformer trained for recall alone leaves most heads idle or lets them do the
same work twice, and a test with it passes while heads are lost or swapped. Asked to say `?` as soon as any
head of any layer is not what it should be, it has to make each head's share necessary.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoint import write_checkpoint
from faults import Faults, draw_faults, kinds_for
from latent_model import LatentRecallModel, LatentShape
from model import RecallModel, Shape
from recall import MAX_PROMPT_TOKENS, NUM_SYMBOLS, vocabulary
from safetensors.torch import load_file
from torch import Tensor

WORDS = vocabulary()
FAULT_ID = WORDS.index("?")
SPANS = (16, 128, 4096)  # what is measured: a block of either size, the whole prompt
# Zeros and other heads are easy to notice; the same head's content for other tokens is not.
WEIGHT_OF = {"lost": 0.5, "foreign": 2.0, "swapped": 0.5, "stale": 1.0}
CHAIN_ID, KEY_ID, VALUE_ID = WORDS.index("0"), WORDS.index("0:"), WORDS.index("0,")


def draw_batch(batch: int, pairs: int, steps: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random questions: table [batch, 2 * pairs], chain [batch, steps + 1], pair_positions [batch, steps]."""
    cycle = torch.rand(batch, NUM_SYMBOLS, device=device).argsort(-1)[:, :pairs]
    order = torch.rand(batch, pairs, device=device).argsort(-1)
    keys, values = cycle.gather(1, order), cycle.roll(-1, 1).gather(1, order)
    table = torch.stack((keys + KEY_ID, values + VALUE_ID), -1).flatten(1)
    along = (torch.arange(steps + 1, device=device) % pairs).expand(batch, -1)
    place = order.argsort(-1)
    return table, cycle.gather(1, along) + CHAIN_ID, 2 * place.gather(1, along[:, :-1])


def build(shape: Shape) -> RecallModel:
    """The model of that shape, with random weights."""
    return LatentRecallModel(shape) if isinstance(shape, LatentShape) else RecallModel(shape)


def give_stems(model: RecallModel) -> None:
    """Let `17`, `17:` and `17,` begin nearly alike: that they belong together need not be learned."""
    table = model.model.embed_tokens.weight
    with torch.no_grad():
        stems = table[CHAIN_ID : CHAIN_ID + NUM_SYMBOLS].clone()
        for first in (CHAIN_ID, KEY_ID, VALUE_ID):
            form = torch.randn_like(table[0]) * table.shape[1] ** -0.5
            table[first : first + NUM_SYMBOLS] = stems + form
        model.head().copy_(table)


def clean_loss(model: RecallModel, batch: int, pairs: int, steps: int, device: torch.device) -> Tensor:
    """Recall loss of one random batch."""
    table, chain, _ = draw_batch(batch, pairs, steps, device)
    logits = model(table, chain[:, :-1], lambda layer, keys, values: (keys[None], values[None]), 1).float()
    return F.cross_entropy(logits.flatten(0, 2), chain[:, 1:].flatten())


def losses(
    model: RecallModel, batch: int, pairs: int, steps: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Recall loss and fault loss of one random batch."""
    table, chain, positions = draw_batch(batch, pairs, steps, device)
    faults = draw_faults(table, positions, model.shape.num_layers, model.shape.num_kv_heads)
    logits = model(table, chain[:, :-1], faults, 1 + len(faults.kinds)).float()
    recall = F.cross_entropy(logits[0].flatten(0, 1), chain[:, 1:].flatten())
    noticed = faults.notices(table, positions)
    surprise = logits[1:].logsumexp(-1) - logits[1:, ..., FAULT_ID]
    weights = torch.tensor([WEIGHT_OF[kind] for kind in faults.kinds], device=device)
    due = noticed * weights[:, None, None]
    return recall, (surprise * due).sum() / due.sum().clamp(min=1)


@torch.no_grad()
def measure(
    model: RecallModel, device: torch.device, pairs: int, batch: int, steps: int = 8
) -> tuple[float, Tensor]:
    """Share of right whole answers, and of those broken by a fault of one head: [kind, layer, kv_head, span].

    Greedy decoding is right exactly when every step is right after a right beginning: no loop is needed.
    A fault strikes keys and values of a block of 16 or 128 tokens that the first step reads, or all of them.
    """
    shape = model.shape
    kinds = kinds_for(shape.num_kv_heads)
    table, chain, positions = draw_batch(batch, pairs, steps, device)
    tokens = torch.arange(2 * pairs, device=device)
    yes = torch.ones(len(kinds), batch, dtype=torch.bool, device=device)
    size = (len(kinds), batch, shape.num_layers, shape.num_kv_heads, 2 * pairs)
    broken = torch.zeros(len(kinds), shape.num_layers, shape.num_kv_heads, len(SPANS))
    right = 0.0
    for layer in range(shape.num_layers):
        for head in range(shape.num_kv_heads):
            for column, span in enumerate(SPANS):
                place = torch.zeros(size, dtype=torch.bool, device=device)
                place[:, :, layer, head] = tokens // span == positions[:, :1] // span
                faults = Faults(kinds, place, yes, yes, head_shift=1, token_shift=pairs | 1, batch_shift=1)
                best = model(table, chain[:, :-1], faults, 1 + len(kinds)).argmax(-1)
                whole = (best == chain[:, 1:]).all(-1).float().mean(-1).cpu()
                right, broken[:, layer, head, column] = whole[0].item(), 1 - whole[1:]
    return right, broken


def report(model: RecallModel, device: torch.device, batch: int) -> tuple[float, float]:
    """Print figures for three lengths; return the lowest share of right answers and of broken ones."""
    kinds = kinds_for(model.shape.num_kv_heads)
    lowest_right, lowest_broken = 1.0, 1.0
    for pairs in (8, 64, MAX_PROMPT_TOKENS // 2 - 1):
        right, broken = measure(model, device, pairs, batch)
        # A whole prompt of one request moved within itself is the same set: no fault.
        broken[kinds.index("stale"), ..., [span >= 2 * pairs for span in SPANS]] = 1.0
        lowest_right, lowest_broken = min(lowest_right, right), min(lowest_broken, broken.min().item())
        print(f"  {pairs} pairs: {right:.2%} right; % broken, least of the heads, for spans 16, 128 and all:")
        for kind, layers in zip(kinds, (100 * broken.amin(2)).round().int().tolist(), strict=True):
            print(f"    {kind}: " + ", ".join(f"layer {i} {spans}" for i, spans in enumerate(layers)))
    return lowest_right, lowest_broken


def train(model: RecallModel, args: argparse.Namespace, device: torch.device) -> None:
    begin, limit = time.monotonic(), args.minutes * 60
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    step, mean_recall, fault_weight, best, next_report = 0, math.log(len(WORDS)), 0.0, -1.0, args.report_every
    if args.start:
        fault_weight = args.fault_weight
    longest = args.start_pairs
    while (done := (time.monotonic() - begin) / limit) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 300) * (1 - max(done, args.flat))
        # More short tables than long ones: each length is to be as good as any other.
        pairs = 4 + int((longest - 3) * torch.rand(()) ** args.short_bias)
        # At first never round again within one answer: it could be copied from the first, not the table.
        steps = int(torch.randint(3, min(2 * pairs if fault_weight else pairs, 24), ()))
        # Long prompts in smaller batches: about the same number of tokens each.
        batch = min(2 * args.batch, max(args.batch // 4, args.batch * 64 // pairs))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if fault_weight:
                recall, fault = losses(model, batch, pairs, steps, device)
            else:
                recall = clean_loss(model, batch, pairs, steps, device)
                fault = torch.zeros_like(recall)
        loss = recall + fault_weight * fault
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            mean_recall = 0.8 * mean_recall + 0.2 * recall.item()
            # Recall first, from short tables to long ones; then every head's share of it.
            if mean_recall < 0.5:
                longest = min(MAX_PROMPT_TOKENS // 2 - 1, longest + 4)
            if mean_recall < 0.5 and longest >= args.fault_from:
                fault_weight = min(args.fault_weight, fault_weight + args.fault_weight / 50)
        if step % 200 == 0:
            print(
                f"{time.monotonic() - begin:.0f} s, step {step}: longest {longest}, "
                f"recall {mean_recall:.4f}, fault {fault.item():.4f} x {fault_weight:.2f}",
                flush=True,
            )
        if done * args.minutes > next_report:
            next_report += args.report_every
            best = keep_best(model, args, device, best)
    keep_best(model, args, device, best)


def keep_best(model: RecallModel, args: argparse.Namespace, device: torch.device, best: float) -> float:
    """Save the weights, in bf16, if with them the worst figure is the best so far."""
    rounded = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    as_saved = build(model.shape).to(device).eval()
    as_saved.load_state_dict(rounded)
    right, broken = report(as_saved, device, args.report_batch)
    score = min(right, broken) if right > 0.99 else right - 1
    print(f"  score {score:.4f}, before {best:.4f}", flush=True)
    if score > best:
        write_checkpoint(args.out, rounded, model.shape)
    return max(score, best)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the recall model on one GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--start", type=Path, help="model.safetensors to go on from")
    parser.add_argument("--minutes", type=float, default=11.0)
    parser.add_argument("--report-every", type=float, default=1.5, help="minutes between evaluations")
    parser.add_argument("--report-batch", type=int, default=256)
    parser.add_argument("--batch", type=int, default=192, help="examples per step at 64 pairs")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--flat", type=float, default=0.1, help="share of the time before the rate falls")
    parser.add_argument("--fault-weight", type=float, default=0.7)
    parser.add_argument("--start-pairs", type=int, default=16, help="longest table at the beginning")
    parser.add_argument("--fault-from", type=int, default=48, help="table length for the fault loss")
    parser.add_argument(
        "--short-bias", type=float, default=1.3, help="1: all lengths alike; more: shorter tables"
    )
    parser.add_argument("--latent", action="store_true", help="DeepSeek-V3's architecture, not Llama's")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--rope-theta", type=float, default=1e5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = LatentShape if args.latent else Shape
    shape = kind(len(WORDS), args.layers, args.hidden, rope_theta=args.rope_theta)
    model = build(shape).to(device)
    give_stems(model)
    # cuDNN's attention builds a plan for every new shape, and every step has one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if args.start:
        model.load_state_dict({name: t.float() for name, t in load_file(args.start).items()})
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{sum(p.numel() for p in model.parameters())} parameters on {device}", flush=True)
    train(model, args, device)


if __name__ == "__main__":
    main()
