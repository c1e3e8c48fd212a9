"""The page that `--report` writes: what was made, what became of every matrix, what verify found."""

import html as markup
from collections.abc import Iterable
from statistics import mean
from typing import Any

from marlin_convert.checkpoint.manifest import PAGE
from marlin_convert.matrix import fate_of
from marlin_convert.plot import COLOURS, Point, curves
from marlin_convert.report import groups


def html(
    manifest: dict[str, Any], verified: dict[str, Any] | None = None, run: dict[str, str] | None = None
) -> str:
    """One self-contained page of a manifest, of what `verify` found, and of what only the run knows."""
    title = _title(manifest)
    parts = (
        f"<h1>{title}</h1>",
        _facts(manifest, run or {}),
        _verified(verified),
        _tuning(manifest.get("tuning")),
        _divergence(manifest["divergence"], verified),
        _errors(manifest["matrices"]),
        _left(manifest),
        _table(manifest["matrices"]),
    )
    return (
        f"{PAGE}<meta name=viewport content='width=device-width'><title>{title}</title>"
        f"<style>{_STYLE}</style><main>{''.join(parts)}</main><script>{_SORTING}</script></html>\n"
    )


_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b8568d", "#2b7fb8", "#a86f00", "#000000", "#77772b")
_DARK = ("#56b4e9", "#e69f00", "#2bd4a4", "#e59cc4", "#8ec9ff", "#f4b942", "#dddddd", "#cccc66")
assert len(_DARK) == len(_LIGHT) == COLOURS


def _colours(lines: Iterable[str], **others: str) -> str:
    named = [f"--line-{number}:{colour};" for number, colour in enumerate(lines)]
    return "".join([*named, *(f"--{name}:{colour};" for name, colour in others.items())])


_STYLE = (
    ":root{color-scheme:light dark;"
    f"{_colours(_LIGHT, text='#222', back='#fff', rule='#ddd', bad='#b00020')}}}"
    "@media(prefers-color-scheme:dark){:root{"
    f"{_colours(_DARK, text='#ddd', back='#16181b', rule='#3a3d42', bad='#ff8080')}}}}}"
    "body{font:15px/1.5 system-ui,sans-serif;margin:0;color:var(--text);background:var(--back)}"
    "main{max-width:62rem;margin:0 auto;padding:1rem}"
    "h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin-top:2rem}"
    "dl{display:grid;grid-template-columns:minmax(6rem,max-content) 1fr;gap:.1rem 1rem}"
    "dd{margin:0;overflow-wrap:anywhere}dt{opacity:.7}li{overflow-wrap:anywhere}"
    ".wide{overflow-x:auto}.fail{color:var(--bad);font-weight:600}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{text-align:right;padding:.1rem .8rem;border-bottom:1px solid var(--rule)}"
    "td:first-child,th:first-child{text-align:left;padding-left:0}"
    "th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid}"
    "th[aria-sort=ascending] button::after{content:' \\2191'}"
    "th[aria-sort=descending] button::after{content:' \\2193'}"
    # narrower than this the names at the lines would be too small to read: the picture is moved instead
    ".wide svg{width:100%;min-width:640px;height:auto;font-size:13px}"
    "svg text{fill:currentColor}svg .grid{stroke:var(--rule)}svg g text{fill:var(--colour)}"
    "svg polyline{fill:none;stroke:var(--colour);stroke-width:2}"
    "svg circle{fill:var(--colour);fill-opacity:.35}svg circle:hover{fill-opacity:1}"
)

_SORTING = (
    "for(const b of document.querySelectorAll('th button'))b.onclick=()=>{"
    "const h=b.parentNode,t=h.closest('table'),i=h.cellIndex,down=h.ariaSort==='ascending';"
    "for(const o of h.parentNode.cells)o.removeAttribute('aria-sort');"
    "h.ariaSort=down?'descending':'ascending';"
    "const v=r=>r.cells[i].textContent,n=x=>x===''?-1/0:+x,"
    "rows=[...t.tBodies[0].rows].sort((p,q)=>{const a=v(p),c=v(q);"
    "return isNaN(n(a))||isNaN(n(c))?a.localeCompare(c,'en',{numeric:true}):n(a)-n(c)});"
    "t.tBodies[0].append(...(down?rows.reverse():rows))}"
)


def _title(manifest: dict[str, Any]) -> str:
    fates = [fate_of(row) for row in manifest["matrices"]]
    return markup.escape(f"{manifest['source']['name']} in {manifest['recipe']['format']}, {groups(fates)}")


def _facts(manifest: dict[str, Any], run: dict[str, str]) -> str:
    """From what it was made, when, and with what."""
    source, versions, text = manifest["source"], manifest["versions"], manifest["calibration"]
    written = sum(file["size"] for file in manifest["files"].values())
    commit = f" at {source['commit']}" if source["commit"] else ""
    facts = {
        "made from": f"{source['name']}{commit}",
        "made with": f"{manifest['tool']}, " + ", ".join(f"{name} {said}" for name, said in versions.items()),
        "device": str(manifest["device"]),
        "effort": "none: the codes are the source's"
        if manifest["repacked"]
        else manifest["recipe"]["effort"],
        "calibration": f"{text['text']}, {_tokens(text)}" if text else "none",
        "bits per weight": str(manifest["bits_per_weight"]),
        "size": f"{written / 1e6:,.2f} MB on disk",
        **run,
    }
    said = "".join(f"<dt>{name}<dd>{markup.escape(fact)}" for name, fact in facts.items())
    return f"<dl>{said}</dl>"


def _tokens(text: dict[str, Any]) -> str:
    return f"{text['samples']} x {text['sequence_length']} tokens"


def _measured(verified: dict[str, Any] | None) -> dict[str, Any]:
    """What verify measured on text, nothing where it has not."""
    return (verified or {}).get("checks", {}).get("numbers", {}).get("details", {}).get("text") or {}


def _verified(verified: dict[str, Any] | None) -> str:
    """What every check said, and what the model is worth on text that it has not seen."""
    if verified is None:
        return "<h2>Not verified yet</h2><p>marlin-convert verify DIR --source MODEL --report FILE.html</p>"
    rows = "".join(
        f"<tr><td>{markup.escape(name)}<td class={check['status']}>{check['status']}"
        f"<td style='text-align:left'>{markup.escape(check['reason'])}"
        for name, check in verified["checks"].items()
    )
    text, said = _measured(verified), ""
    if "divergence" in text:
        said = (
            f"<p>On {_tokens(text)} ({markup.escape(text['name'])}) that it was not calibrated on: "
            f"perplexity {text['source_perplexity']:.3f} before and {text['perplexity']:.3f} now, KL "
            f"divergence from the original {text['divergence']:.4f} nats a token, the same next token in "
            f"{text['agreement']:.1%}; means of {text['tokens']:,} tokens.</p>"
        )
    elif "perplexity" in text:
        said = f"<p>Perplexity {text['perplexity']:.3f} on {text['tokens']:,} tokens.</p>"
    whole = "Verified" if verified["verified"] else "Not verified" if verified["passed"] else "Failed"
    return f"<h2>{whole}</h2>{said}<div class=wide><table><tbody>{rows}</tbody></table></div>"


def _tuning(said: dict[str, Any] | None) -> str:
    """What tuning has made of the answers; the figures that follow are those of the solver."""
    if not said or not said["kept"]:
        return ""
    before, after = said["held_out_divergence"]["solved"], said["held_out_divergence"]["tuned"]
    return (
        f"<h2>Tuned</h2><p>In {said['steps']} steps: KL divergence from the original's answers on text held "
        f"out {before:.5f}, now {after:.5f}. The curves below were found before that.</p>"
    )


def _divergence(after: list[float], verified: dict[str, Any] | None) -> str:
    """The hidden states' distance from the original's over the blocks."""
    lines = {
        name: [
            Point(block, value, f"after block {block}, {name}: {value:.4f}")
            for block, value in enumerate(found)
        ]
        for name, found in (("calibration", after), ("text not seen", _measured(verified).get("hidden", [])))
        if found
    }
    if not lines:
        return ""
    return (
        "<h2>Hidden states</h2><p>How far they are from the original model's after every block, relative to "
        f"them.</p><div class=wide>{curves(lines, 'relative distance')}</div>"
    )


def _errors(matrices: list[dict[str, Any]]) -> str:
    """The errors over the blocks, a line for every kind of linear; of the experts of a block their mean."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in matrices:
        if "error" in row:
            block = next(int(part) for part in row["name"].split(".") if part.isdigit())
            kind = row["name"].rpartition(".")[2]
            found.setdefault(kind, {}).setdefault(block, []).append(row["error"])
    if not found:
        return "<h2>Errors</h2><p>The codes are the source's own: there is no error to show.</p>"
    lines = {
        kind: [_point(kind, block, errors) for block, errors in sorted(blocks.items())]
        for kind, blocks in found.items()
    }
    return (
        "<h2>Errors</h2><p>||x(W - W<sub>q</sub>)|| / ||xW|| on the calibration text: what a linear makes up "
        "for of those before it counts as its error, so the hidden states say more of the model.</p>"
        f"<div class=wide>{curves(lines, 'relative error of the output')}</div>"
    )


def _point(kind: str, block: int, errors: list[float]) -> Point:
    several = f" on the average of {len(errors)}, at most {max(errors):.4f}" if errors[1:] else ""
    return Point(block, mean(errors), f"block {block}, {kind}: {mean(errors):.4f}{several}")


def _left(manifest: dict[str, Any]) -> str:
    """What stayed dense, was left out, or is not as was asked."""
    fates = [fate_of(row) for row in manifest["matrices"]]
    behind = [f"tensor {name}" for name in manifest["left_out"]] + manifest["left_behind"]
    behind += [f"{fate.name} is not 2:4 ({fate.reason})" for fate in fates if fate.packed and fate.reason]
    lists = {
        "Left dense": [f"{fate.name}: {fate.reason}" for fate in fates if not fate.worked_on],
        "Left out, or not as asked": behind,
        "Copied, no part of the model that is built": manifest["beside"],
    }
    return "".join(
        f"<h2>{name}</h2>"
        + (f"<ul>{''.join(f'<li>{markup.escape(one)}' for one in said)}</ul>" if said else "<p>Nothing.</p>")
        for name, said in lists.items()
    )


def _table(matrices: list[dict[str, Any]]) -> str:
    """Every linear with an error, in an order that a click on a column changes."""
    rows = "".join(
        f"<tr><td>{markup.escape(row['name'])}<td>{row['k']}<td>{row['n']}<td>{row['error']:.4f}"
        f"<td>{row.get('tokens', '')}<td>{'yes' if row.get('rounded_to_nearest') else ''}"
        for row in matrices
        if "error" in row
    )
    if not rows:
        return ""
    columns = ("linear", "inputs", "outputs", "error", "tokens of an expert", "rounded to nearest")
    head = "".join(f"<th><button>{name}</button>" for name in columns)
    return (
        f"<h2>Linears</h2><div class=wide><table><thead><tr>{head}</thead><tbody>{rows}</tbody></table></div>"
    )
