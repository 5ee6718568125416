"""The look of the page: light and dark as the reader's system is, nothing loaded from elsewhere."""

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfa; --ink: #1d1f21; --faint: #6c6f73; --line: #dcdcd6; --card: #ffffff;
  --error: #b3261e; --warning: #8a5a00; --bar: #7a9cc6; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181a; --ink: #e6e6e3; --faint: #9b9ea3; --line: #34363a; --card: #1f2124;
  --error: #ff8a80; --warning: #ffc266; --bar: #4f6f9c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1500px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
small, dt { color: var(--faint); font-size: .8rem; font-weight: normal; }
section.error > h2, .problem { color: var(--error); } section.warning > h2 { color: var(--warning); }
li, td, dd, figcaption { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { width: 12rem; } .bar span { display: block; height: .7rem; margin-top: .3rem; background: var(--bar); }
summary { cursor: pointer; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: .8rem; align-items: start; }
figure { margin: 0; padding: .5rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
img { display: block; max-width: 100%; max-height: 256px; margin: 0 auto .4rem; }
figcaption { font-size: .85rem; } dl { margin: .3rem 0; } dd { margin: 0 0 .3rem; white-space: pre-wrap; }
a { color: inherit; }
"""
