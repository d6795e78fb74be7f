"""What the page shows, as HTML: sizes, the plan as bars, answers, scores. No script, no font or style from elsewhere."""

from html import escape

from hf_lop import Plan

CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 0 !important; }
.lop { --kept: #2f6f8f; --on-kept: #fff; --right: #2e7d4f; --wrong: #b3402a; color: var(--body-text-color); }
.dark .lop { --kept: #5fa8cc; --on-kept: #0b1720; --right: #6cc492; --wrong: #f08a72; }
.lop h1 { font-size: 1.7rem; line-height: 1.2; margin: .4rem 0 .3rem; }
.lop p { margin: 0; line-height: 1.5; }
.lop .faint { color: color-mix(in srgb, var(--body-text-color) 70%, transparent); font-size: .85rem; }
.lop .tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; }
.lop .tiles > div, .lop .answers > div { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: .6rem .7rem; }
.lop .big { font-size: 1.25rem; font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap; }
.lop .bars { display: flex; gap: 5px; height: 180px; }
.lop .bar { flex: 1; min-width: 0; border-radius: 6px 6px 3px 3px; background: var(--border-color-primary);
  position: relative; overflow: hidden; }
.lop .bar i { position: absolute; inset: auto 0 0 0; background: var(--kept); transition: height .25s ease; }
.lop .bar b { position: absolute; inset: auto 0 auto 0; padding: 3px 0; text-align: center; font-size: .78rem;
  line-height: 1.2; font-weight: 600; color: var(--body-text-color); }
.lop .bar.high b { color: var(--on-kept); transform: translateY(100%); }
.lop .layers { display: flex; gap: 5px; margin: .25rem 0 .5rem; }
.lop .layers span { flex: 1; text-align: center; font-size: .78rem; color: color-mix(in srgb, var(--body-text-color) 70%, transparent); }
.lop .answers { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }
.lop .right { color: var(--right); }
.lop .wrong { color: var(--wrong); }
.lop .score { display: grid; grid-template-columns: auto 1fr auto; gap: .35rem .6rem; align-items: center; }
.lop .track { height: 14px; border-radius: 7px; background: var(--border-color-primary); overflow: hidden; }
.lop .track i { display: block; height: 100%; background: var(--kept); }
#picture img { border-radius: 10px; }
#picture .icon-button-wrapper { display: none; }
#questions label { width: 100%; }
@media (max-width: 640px) {
  .lop h1 { font-size: 1.35rem; }
  .lop .big { font-size: 1rem; }
  .lop .tiles > div, .lop .answers > div { padding: .5rem; }
  .lop .bars { height: 130px; }
}
"""
INTRO = """<div class="lop"><h1>One small multimodal LLM, pruned to any size</h1>
<p>A trained pruner knows which neurons each layer can spare. Move the slider: it plans the width of every layer, cuts the
model and lets the kept neurons take over, on this CPU, while you watch. The model is a real Qwen2.5-VL, only tiny.</p></div>"""
ASK_ALL = '<div class="lop"><p class="faint">One answer says little. Let both models answer all of them.</p></div>'


def sizes(plan: Plan, seconds: float) -> str:
    """Three tiles: parameters, memory, FLOPs; and what the change took."""
    rows = [
        ("Parameters", f"{plan.parameters:,}", plan.parameters / plan.dense.parameters),
        ("Weights", f"{plan.memory_after / 1e6:.2f} MB", plan.memory_after / plan.memory_before),
        ("FLOPs per token", f"{plan.flops / 1e3:,.0f} k", plan.flops / plan.dense.flops),
    ]
    tiles = "".join(
        f'<div><p class="faint">{name}</p><p class="big">{value}</p><p class="faint">{_change(share)}</p></div>'
        for name, value, share in rows
    )
    took = f", planned and cut in {1e3 * seconds:.0f} ms" if plan.neurons_removed else ""
    return (
        f'<div class="lop"><div class="tiles">{tiles}</div><p class="faint" style="margin-top:.6rem">'
        f"{plan.pruning_ratio:.1%} of {sum(plan.dense.widths)} FFN neurons removed{took}.</p></div>"
    )


def bars(plan: Plan) -> str:
    """The kept share of every layer."""
    found = []
    for layer, (kept, full) in enumerate(zip(plan.widths, plan.dense.widths, strict=True)):
        share = kept / full
        found.append(
            f'<div class="bar{" high" if share > 0.8 else ""}" role="img" '
            f'aria-label="Layer {layer} keeps {kept} of {full} neurons">'
            f'<i style="height:{share:.1%}"></i><b style="bottom:{share:.1%}">{share:.0%}</b></div>'
        )
    names = "".join(f"<span>{layer}</span>" for layer in range(len(plan.widths)))
    return (
        f'<div class="lop"><div class="bars">{"".join(found)}</div><div class="layers" aria-hidden="true">{names}</div>'
        '<p class="faint">Neurons that each decoder layer keeps.</p></div>'
    )


def answers(dense: str, pruned: str, expected: str, percent: int) -> str:
    """Both answers side by side, and the right one."""
    cells = "".join(
        f'<div><p class="faint">{name}</p><p class="big {"right" if said == expected else "wrong"}">'
        f"{escape(said) or '(nothing)'} {'✓' if said == expected else '✗'}</p></div>"
        for name, said in (("Dense model", dense), (f"Pruned by {percent} %", pruned))
    )
    note = f"The right answer is <b>{escape(expected)}</b>."
    return f'<div class="lop"><div class="answers">{cells}</div><p class="faint" style="margin-top:.5rem">{note}</p></div>'


def scores(dense: int, pruned: int, total: int) -> str:
    """How many questions both models answered right."""
    rows = "".join(
        f'<span>{name}</span><div class="track"><i style="width:{right / total:.1%}"></i></div>'
        f"<span>{right} of {total} right</span>"
        for name, right in (("Dense", dense), ("Pruned", pruned))
    )
    return f'<div class="lop"><div class="score">{rows}</div></div>'


def _change(share: float) -> str:
    return f"{share - 1:+.1%}" if share < 1 else "all of it"
