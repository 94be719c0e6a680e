"""Contexts longer than one pass: read in chunks and appended or compacted again, against one pass over all.

    python bench/iterated.py --difficulty standard --chunk 288 --count 20      # 4 chunks of a standard matter
    python bench/iterated.py --difficulty long --chunk 1152 --count 8          # 4 trained chunks
    python bench/iterated.py --difficulty long --chunk 1152 --uneven           # by the compactors' own split

Prints pass rates with intervals clustered by matter, by depth of the fact, beside floor and ceiling; appends the
rows to bench/rows/iterated.csv. "single chunks" asks for each fact behind its own chunk alone, compacted from
the full cache, with nothing beside it but the instruction: what a chunk's compaction loses before anything is iterated.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from shapes import ROWS, append_csv

from still import models, slots_for
from still.cache import StillCache
from still.cache_ragged import RaggedSlots
from still.eval.judge import exact_judge
from still.eval.stats import clustered_rate
from still.harness.ask import Prompt, ask
from still.harness.cells import SweepConfig
from still.harness.question_sets import question_sets
from still.harness.sweep import Bench
from still.prompts import render, render_alone, render_answer
from still.provenance import provenance
from still.types import CompactKV

APPENDED = {
    "append": {}, "append, slots where their tokens stood": {"reach": math.inf},
    "append, no raw chunk held back": {"keep_last": 0},
}  # fmt: skip
QUARTERS = ("0-25 %", "25-50 %", "50-75 %", "75-100 %")


def caches(
    model, full, compactor, ids: torch.Tensor, chunk: int, ratio: float, head: int, depths: list[float]
) -> dict:
    """Every way to a compact cache of this context, by name: caches, each with the facts that are asked of it.

    Args:
        full: the context's own cache.
        head: tokens of the instruction before the documents.
        depths: of the facts.
    """
    tokens, every, ways = ids.shape[1], range(len(depths)), {}
    if tokens <= compactor.config.chunk:
        ways["one pass"] = [(compactor.prefill(model, ids, ratio=ratio), every)]
    places = [int(depth * tokens) for depth in depths]
    spans = [range(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
    inside = [[fact for fact in every if places[fact] in span] for span in spans]
    ways["single chunks"] = [(one_chunk(compactor, full, ids, span, ratio, head), facts)
                             for span, facts in zip(spans, inside, strict=True) if facts]  # fmt: skip
    for name, options in APPENDED.items():
        ways[name] = [(compactor.prefill(model, ids, ratio=ratio, chunk=chunk, **options), every)]
    again = compactor.prefill(model, ids, slots=int(chunk / ratio), chunk=chunk, mode="recompact")
    return {**ways, "recompact": [(again, every)]}


def one_chunk(compactor, full, ids: torch.Tensor, span: range, ratio: float, head: int) -> StillCache:
    """The first `head` tokens of a full cache, and the slots of one span of it."""
    where, count = torch.arange(max(head, span.start), span.stop), slots_for(len(span), ratio)
    layers = {}
    for layer in map(int, compactor.layers):
        whole = full.layers[layer].keys, full.layers[layer].values
        made = compactor.compact_layer(layer, *(x[:, :, where] for x in whole), where, count)
        layers[layer] = behind(CompactKV(*(x[:, :, :head] for x in whole), positions=torch.arange(head)[None]), made)
    if compactor.split:
        return StillCache.from_layers(compactor.model_config, layers, ids.shape[1], source=full, token_ids=ids)
    positions = torch.cat((torch.arange(head), compactor.slot_positions(where, count)[0]))
    return StillCache.from_layers(
        compactor.model_config, layers, ids.shape[1], source=full, token_ids=ids, positions=positions
    )


def behind(first: CompactKV, made: CompactKV) -> CompactKV:
    """Some slots, equally many in every head, and those of one compaction behind them."""
    if made.counts is None:
        return CompactKV(*(torch.cat(pair, dim=2) for pair in zip(first[:2], made[:2], strict=True)))
    both = RaggedSlots.of(first).then(RaggedSlots.of(made))
    return CompactKV(both.keys[None], both.values[None], None, tuple(both.counts[0].tolist()), both.positions[None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--difficulty", default="standard")
    parser.add_argument("--chunk", type=int, default=288)
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--questions", type=int, default=0, help="drawn for each matter; 0 asks about every fact")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the compactors' training")
    parser.add_argument("--uneven", action="store_true", help="slots by the compactors' own split")
    args = parser.parse_args()
    config = SweepConfig(
        model=args.model, compactor=(args.model,), difficulty=args.difficulty, count=args.count,
        questions=args.questions, seeds=tuple(args.seeds), methods=("still",),
    )  # fmt: skip
    loaded = models.load(args.model, "cpu", "float32", "still" if args.uneven else None)
    bench = Bench(config, loaded, config.methods)
    compactors = {seed: own.with_split("own" if args.uneven else None) for seed, own in bench.compactors.items()}
    ends = (bench.tokenizer.eos_token_id,)
    rates: dict[str, list[list[bool]]] = {}
    deep: dict[str, list[list[bool]]] = {}
    sizes: dict[str, list[int]] = {}
    tokens = []
    for each in question_sets(config, "matters", bench.count_tokens):
        ids, questions = render(bench.tokenizer, each.documents, [q.text for q in each.questions], bench.form)
        answers = [render_answer(bench.tokenizer, q.text, q.answer, bench.form) for q in each.questions]
        context = torch.tensor([ids])
        tokens.append(len(ids))
        alone, floor_questions = render_alone(bench.tokenizer, [q.text for q in each.questions], bench.form)
        head = next(place for place, pair in enumerate(zip(ids, [*alone, -1], strict=False)) if len(set(pair)) > 1)
        depths = [question.tags["depth"] for question in each.questions]
        full, every = bench.read(ids).cache, range(len(depths))
        ways = [("none", [(bench.read(alone).cache, every)], floor_questions), ("full", [(full, every)], questions)]
        for compactor in compactors.values():
            made = caches(bench.model, full, compactor, context, args.chunk, args.ratio, head, depths)
            ways += [(name + ", uneven" * args.uneven, parts, questions) for name, parts in made.items()]
        seen: dict[str, list[bool]] = {}
        for name, parts, texts in ways:
            for cache, facts in parts:
                prompt = Prompt([texts[i] for i in facts], [answers[i] for i in facts], ends)
                for fact, out in zip(facts, ask(bench.model, cache, prompt).outputs, strict=True):
                    passed = exact_judge(bench.text(out), each.questions[fact]).passed
                    seen.setdefault(name, []).append(passed)
                    quarters = deep.setdefault(name, [[] for _ in QUARTERS])
                    quarters[min(3, int(4 * depths[fact]))].append(passed)
                physical = getattr(cache, "physical_length", None) or cache.get_seq_length()
                sizes.setdefault(name, []).append(physical)
        for name, right in seen.items():
            rates.setdefault(name, []).append(right)
    made = provenance(vars(args), args.seeds[0], "cpu", model=loaded.name)
    print(f"{len(tokens)} {args.difficulty} matters of {min(tokens)} to {max(tokens)} tokens, chunks of {args.chunk}, "
          f"{args.ratio:g}x, compactor seeds {list(bench.compactors)}")  # fmt: skip
    rows = []
    for name, clusters in rates.items():
        passed = [float(right) for part in clusters for right in part]
        rate = clustered_rate(passed, [place for place, part in enumerate(clusters) for _ in part])
        quarters = [sum(part) / len(part) if part else float("nan") for part in deep[name]]
        by_depth = "  ".join(f"{quarter:.1%}" for quarter in quarters)
        columns = statistics.mean(sizes[name])
        print(f"{name:32s} {rate.estimate:7.1%} [{rate.low:.1%}, {rate.high:.1%}]  columns {columns:7.1f}  {by_depth}")
        rows.append({
            "difficulty": args.difficulty, "tokens": round(statistics.mean(tokens)), "chunk": args.chunk,
            "ratio": args.ratio, "way": name, "pass_rate": rate.estimate, "low": rate.low, "high": rate.high,
            **dict(zip(QUARTERS, quarters, strict=True)), "columns": statistics.mean(sizes[name]),
            "matters": len(tokens), "seeds": " ".join(map(str, bench.compactors)), "model": loaded.name,
            "device": made["device"]["name"], "commit": (made["git"] or {}).get("commit", ""),
        })  # fmt: skip
    append_csv(ROWS / "iterated.csv", rows)


if __name__ == "__main__":
    main()
