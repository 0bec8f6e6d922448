"""How the page looks, on screens light and dark, narrow and wide, and on paper. Nothing is loaded from elsewhere."""

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1b1f24",
    "muted": "#57606a",
    "rule": "#dfe3e8",
    "c0": "#0069b4",
    "c1": "#b84a00",
    "c2": "#007a5a",
    "c3": "#a6438a",
    "c4": "#7d6000",
    "c5": "#4c5561",
}
DARK = {
    "paper": "#12151a",
    "panel": "#1a1e25",
    "ink": "#e7eaee",
    "muted": "#a0a9b4",
    "rule": "#2f353e",
    "c0": "#62b5f0",
    "c1": "#ff9150",
    "c2": "#3fcfa4",
    "c3": "#ee9bd2",
    "c4": "#e6c04c",
    "c5": "#bcc4ce",
}
"""Colours of lines are Okabe and Ito's hues, which colour-blind people tell apart, at 4.5:1 against the paper or more;
lines differ in their dashes too."""


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


STYLE = (
    f":root{{{_variables(LIGHT)}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    + """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1040px;margin:0 auto;padding:40px 24px 72px}
p{margin:0 0 8px;max-width:72ch;overflow-wrap:anywhere}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:13px}
code{overflow-wrap:anywhere}
h1,h2,h3,h4{line-height:1.25;margin:0;overflow-wrap:anywhere;font-weight:650}
h1{font-size:32px;letter-spacing:-.015em;margin-bottom:10px}
h2{font-size:21px;letter-spacing:-.005em;margin-bottom:14px}
h3{font-size:15px;margin:20px 0 8px}
h4{font-size:13px;margin:14px 0 6px;color:var(--muted)}
section{margin-top:52px}
.kind{font-size:13px;color:var(--muted);letter-spacing:.04em;margin-bottom:6px}
.status{color:var(--muted)}
.lead{color:var(--muted);font-size:14px;margin:-6px 0 18px}
.warning{border-left:3px solid var(--c1);padding-left:12px;margin-top:16px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:1px;margin:28px 0 0;
 border:1px solid var(--rule);border-radius:10px;overflow:hidden}
.tiles div{display:flex;flex-direction:column;justify-content:space-between;
 background:var(--paper);padding:14px 16px;box-shadow:0 0 0 1px var(--rule)}
.tiles dt{font-size:13px;color:var(--muted);line-height:1.3}
.tiles dd{margin:4px 0 0;font-size:23px;font-weight:600;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.facts{display:grid;grid-template-columns:minmax(88px,max-content) minmax(0,1fr);gap:9px 24px;margin:0 0 24px;
 align-items:baseline}
.facts dt{color:var(--muted)}
.facts dd{margin:0;overflow-wrap:anywhere}
.chip{display:inline-block;padding:1px 9px;margin:1px 0;border:1px solid var(--rule);border-radius:6px;
 background:var(--panel);font-size:14px;white-space:nowrap}
.times{white-space:nowrap}
.grid-of-charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:32px 40px;
 align-items:start}
figure{margin:0;min-width:0;break-inside:avoid}
figure.shares{margin:8px 0 24px;max-width:600px}figure.shares table{width:100%}
figcaption p{font-size:13px;color:var(--muted);margin:0}
figcaption>div:first-child{display:flex;justify-content:space-between;gap:12px;align-items:baseline}
.title{font-weight:600;font-size:15px}
.at{color:var(--muted);font-size:13px;white-space:nowrap;font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;margin:3px 0 6px;font-size:14px}
.item{display:inline-flex;align-items:center;gap:7px;min-width:0}
.name{color:var(--muted);overflow-wrap:anywhere}
.value{font-weight:600;font-variant-numeric:tabular-nums}
.key{width:18px;height:0;flex:none;border-top:2.5px solid var(--c)}
.key.c1{border-top-style:dashed}.key.c2{border-top-style:dotted}.key.c4{border-top-style:dashed}
.key.c3{border-top-style:double;border-top-width:4px}.key.c5{border-top-style:dotted}
.swatch{display:inline-block;width:10px;height:10px;border-radius:2px;background:var(--c);margin-right:9px}
.again{opacity:.5}
"""
    + "".join(f".c{n}{{--c:var(--c{n})}}.s{n}{{--c:var(--c{n});fill:var(--c)}}" for n in range(6))
    + """
svg{display:block;width:100%;height:auto;overflow:visible}
svg.bar{height:20px;margin:10px 0 12px;border-radius:4px;overflow:hidden}
svg text{font-size:12.5px;fill:var(--muted);font-variant-numeric:tabular-nums}
.grid line{stroke:var(--rule);stroke-width:1}
.grid line.tick{stroke:var(--muted)}
polyline{fill:none;stroke:var(--c);stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
polyline.raw{stroke-width:1;opacity:.38}
polyline.mean{stroke-width:2.2}
circle{fill:var(--c)}
circle.raw{opacity:.38}
.c1 .line,.c1 .mean{stroke-dasharray:7 4}.c2 .line,.c2 .mean{stroke-dasharray:2 4}
.c3 .line,.c3 .mean{stroke-dasharray:10 3 2 3}.c4 .line,.c4 .mean{stroke-dasharray:14 4}
.c5 .line,.c5 .mean{stroke-dasharray:4 3 1 3}
.mark{stroke:var(--muted);stroke-width:1;stroke-dasharray:2 3}
.cursor{stroke:var(--muted);stroke-width:1;visibility:hidden}
details{margin-top:8px}
summary{cursor:pointer;color:var(--muted);font-size:13px;padding:4px 0;width:fit-content}
summary:hover{color:var(--ink)}
summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--c0);outline-offset:3px;border-radius:3px}
.scroll{overflow-x:auto;max-width:100%}
details .scroll{max-height:420px;overflow-y:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;min-width:min(100%,320px)}
caption{text-align:left;color:var(--muted);font-size:13px;padding:2px 0 6px}
th,td{padding:6px 22px 6px 0;text-align:left;vertical-align:baseline;border-bottom:1px solid var(--rule)}
th:last-child,td:last-child{padding-right:2px}
thead th{color:var(--muted);font-weight:500;font-size:13px;white-space:nowrap}
tbody th{font-weight:400;white-space:nowrap}
.number{text-align:right;white-space:nowrap}
.sample{margin-bottom:22px}
.sample h3{color:var(--muted);font-weight:500;font-size:13px}
pre{margin:0;padding:14px 16px;background:var(--panel);border:1px solid var(--rule);border-radius:8px;
 white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5;unicode-bidi:isolate}
.run{margin-top:28px;border-top:1px solid var(--rule);padding-top:12px}
.run>summary{font-size:18px;font-weight:600;color:var(--ink)}
@media (max-width:600px){
 main{padding:24px 16px 48px}h1{font-size:26px}section{margin-top:42px}
 .tiles{grid-template-columns:1fr 1fr}.tiles dd{font-size:20px}
 .facts{display:block}.facts dt{font-size:13px;margin-top:10px}.facts dd{margin:0}
 svg text{font-size:14.5px}.grid-of-charts{gap:30px}
 th,td{padding-right:16px}
}
@media print{
 body{font-size:11pt}main{max-width:none;padding:0}section{margin-top:24pt}h2{break-after:avoid}
 details:not([open])>summary{display:none}.scroll,details .scroll{overflow:visible;max-height:none}
 .chip,.tiles,.key,.swatch,rect{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""
)
