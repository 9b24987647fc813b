"""The shell of every HTML page that is written here, with its style, and how a file is written
whole.
"""

import html
import os

STYLE = """
:root { --ink: #1c2733; --soft: #64748b; --line: #e2e8f0; --accent: #0f766e; --paper: #ffffff; --desk: #f4f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--desk); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 34px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 0 0 4px; letter-spacing: -0.01em; }
p { color: var(--soft); margin: 0 0 18px; max-width: 76ch; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 14px; padding: 26px 28px; }
section { margin-top: 24px; }
img { display: block; width: 100%; height: auto; }
dl { display: flex; flex-wrap: wrap; gap: 14px 36px; margin: 20px 0 0; }
dt { color: var(--soft); font-size: 13px; } dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 9px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: 14px; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
td code { color: var(--soft); font-size: 12px; margin-left: 10px; }
td.after { color: var(--accent); font-weight: 700; } td.chance, td.baseline, td.before { color: #475569; }
footer { color: var(--soft); font-size: 14px; margin-top: 24px; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
<h1>{title}</h1>
<p>{lead}</p>
<dl>{facts}</dl>
<section><h2>Results</h2>
{results}</section>
{sections}
<footer>{footer}</footer>
</main></body></html>
"""


def page(title, *, lead, facts, results, sections, footer, style='') -> str:
  """One HTML file. `title` and `facts` (name -> text) are plain text; `lead`, `results`, `sections`
  and `footer` HTML; `style`: what comes after STYLE."""
  facts = ''.join(
    f'<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>' for k, v in facts.items()
  )
  return _PAGE.format(
    title=html.escape(title),
    lead=lead,
    facts=facts,
    results=results,
    sections=sections,
    footer=footer,
    style=STYLE + style,
  )


def write_whole(path, text):
  """Writes a text file that is complete whenever it is there."""
  temporary = path.with_suffix('.tmp')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)
