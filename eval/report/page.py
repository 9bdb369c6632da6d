"""The report's page as HTML, self-contained, and as Markdown. Cells, tables and blocks are those of build.py."""

import base64
import re
from html import escape

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #222; background: #fff;
  max-width: 1240px; margin: 2.5rem auto 5rem; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; } p { margin: .4rem 0; max-width: 62rem; }
.lede, .note, figcaption { color: #666; } .note, figcaption { font-size: .85rem; max-width: 62rem; }
.warn { background: #fff7e6; border-left: 4px solid #E69F00; padding: .5rem 1rem; margin: 1rem 0; }
.warn li { margin: .15rem 0; } .warn ul { margin: 0; padding-left: 1.1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; margin: .5rem 0; }
th, td { padding: .34rem .5rem; text-align: right; vertical-align: top; border-bottom: 1px solid #e8e8e8; }
th { font-weight: 600; vertical-align: bottom; border-bottom: 1.5px solid #999; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.long { white-space: normal; min-width: 15rem; }
.words { text-align: left; }
small { display: block; color: #777; font-weight: 400; font-size: .82em; line-height: 1.25; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
.good { color: #00684b; } .bad { color: #b3341f; } .unsure { color: #7a5c00; }
figure { margin: .8rem 0 1.4rem; } img { max-width: 100%; height: auto; display: block; }
pre { background: #f6f6f4; padding: .7rem 1rem; overflow-x: auto; font-size: .84rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: .8rem;
  margin: .5rem 0 1.6rem; }
.sample { border-top: 3px solid; padding-top: .35rem; font-size: .88rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; }
.prompt { border-left: 3px solid #ccc; padding-left: .8rem; color: #555; font-size: .9rem; }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
"""


def to_html(report) -> str:
    """One file: styles inside, pictures as data, no script and nothing fetched."""
    title = escape(report.title)
    body = "\n".join(html_block(block, report.figures, lede=i == 0) for i, block in enumerate(report.blocks))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}<style>{CSS}</style></head>\n'
        f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


TAGS = {"h": "h2", "h3": "h3", "p": "p", "code": "pre"}


def html_block(block: tuple, figures: dict[str, bytes], lede: bool = False) -> str:
    match block:
        case ("h" | "h3" | "p" | "code") as kind, text:
            return f"<{TAGS[kind]}{' class=lede' if lede else ''}>{escape(text)}</{TAGS[kind]}>"
        case "warn", texts:
            return "<div class=warn><ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul></div>"
        case "table", table:
            return html_table(table)
        case "figure", name, caption:
            data = base64.b64encode(figures[name]).decode()
            image = f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
        case "samples", prompt, texts:
            cards = "".join(
                f'<div class=sample style="border-color:{cell.colour}"><b>{escape(cell.text)}</b>'
                f"<div class=text>{escape(text)}</div></div>"
                for cell, text in texts
            )
            return f'<div class="prompt text">{escape(prompt)}</div><div class=samples>{cards}</div>'
        case "fold", title, blocks:
            inner = "\n".join(html_block(b, figures) for b in blocks)
            return f"<details><summary>{escape(title)}</summary>{inner}</details>"
    raise ValueError(f"no such block: {block[0]!r}")


def html_table(table) -> str:
    def cell(c, column: int, tag: str) -> str:
        classes = ["words"] * (column < table.left) + ["long"] * (len(c.text) > 40) + [c.tone] * bool(c.tone)
        text = f"<b>{escape(c.text)}</b>" if c.bold else escape(c.text)
        swatch = f'<span class=swatch style="background:{c.colour}"></span>' if c.colour else ""
        small = f"<small>{escape(c.sub)}</small>" if c.sub else ""
        return f'<{tag} class="{" ".join(classes)}">{swatch}{text}{small}</{tag}>'

    rows = [(table.head, "th"), *((row, "td") for row in table.rows)]
    body = "\n".join("<tr>" + "".join(cell(c, i, tag) for i, c in enumerate(row)) + "</tr>" for row, tag in rows)
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    return f"<div class=wide><table>\n{body}\n</table></div>{note}"


def to_markdown(report) -> str:
    """The same page; pictures are the PNG files beside it."""
    return f"# {plain(report.title)}\n\n" + "\n\n".join(markdown_block(block) for block in report.blocks) + "\n"


def markdown_block(block: tuple) -> str:
    match block:
        case ("h" | "h3" | "p") as kind, text:
            return {"h": "## ", "h3": "### ", "p": ""}[kind] + plain(text)
        case "code", text:
            return indented(text)
        case "warn", texts:
            return "\n".join(f"> - {plain(text)}" for text in texts)
        case "table", table:
            return markdown_table(table)
        case "figure", name, caption:
            return f"![{name}]({name}.png)\n\n{plain(caption)}"
        case "samples", prompt, texts:
            cards = (f"{plain(cell.text)}:\n\n{indented(text)}" for cell, text in texts)
            return "\n\n".join(["Prompt:", indented(prompt), *cards])
        case "fold", title, blocks:
            return "\n\n".join([f"### {plain(title)}", *map(markdown_block, blocks)])
    raise ValueError(f"no such block: {block[0]!r}")


def markdown_table(table) -> str:
    def cell(c) -> str:
        text = plain(c.text + (" " if c.sub.startswith("±") else ", " if c.sub else "") + c.sub)
        return f"**{text}**" if c.bold else text

    rule = [":--" if i < table.left else "--:" for i in range(len(table.head))]
    rows = [[cell(c) for c in table.head], rule, *([cell(c) for c in row] for row in table.rows)]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return text + (f"\n\n{plain(table.note)}" if table.note else "")


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*|<>\[\]&])", r"\\\1", " ".join(text.split()))


def indented(text: str) -> str:
    """A code block; indented, because a sample may hold any fence."""
    return "\n".join("    " + line for line in text.splitlines() or [""])
