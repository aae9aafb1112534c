"""Search results as one HTML page, pictures included."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from plume.inputs.file_kinds import Kind
from plume.search.ranking import Hit
from plume.search.store import TABLES

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
  body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222; }}
  ol {{ list-style: none; padding: 0; display: grid; gap: 1rem; }}
  ol {{ grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }}
  li {{ border: 1px solid #ddd; border-radius: 6px; padding: .8rem; overflow-wrap: anywhere; }}
  .preview {{ height: 192px; display: flex; align-items: center; justify-content: center; overflow: hidden; }}
  .preview {{ background: #f6f6f6; }}
  .preview img {{ max-width: 100%; max-height: 100%; }}
  .preview p {{ margin: .6rem; font-size: 13px; max-height: 100%; }}
  .score {{ float: right; color: #777; }}
</style>
</head>
<body>
<h1>{title}</h1>
<ol>
{items}
</ol>
</body>
</html>
"""


def gallery(hits: Sequence[Hit], title: str) -> str:
    """The page, with thumbnails inside, so that it is one file.

    Args:
        hits: best first.
        title: what was searched for.
    """
    return _PAGE.format(title=escape(title), items="\n".join(map(_item, hits)))


def place_in_file(hit: Hit) -> str:
    """The end of an address that opens a file at a page, a video at a moment, or names a passage; else empty."""
    if hit.content[1] and hit.kind != Kind.VIDEO:
        return f"#page={hit.content[1]}"
    return f"#t={hit.start:g},{hit.end:g}" if hit.kind == Kind.VIDEO and hit.start is not None else ""


def _item(hit: Hit) -> str:
    if hit.thumbnail:
        picture = base64.b64encode(hit.thumbnail).decode()
        preview = f'<img alt="" src="data:image/jpeg;base64,{picture}">'
    else:
        preview = f"<p>{escape(hit.excerpt)}</p>"
    page = f", page {hit.page} of {hit.num_pages}" if hit.page else ""
    name = escape(Path(hit.path).name)
    if not hit.path.startswith(TABLES):
        name = f'<a href="{escape(Path(hit.path).as_uri() + place_in_file(hit))}">{name}</a>'
    if hit.kind == Kind.VIDEO and hit.start is not None and hit.end is not None:
        page = f", {hit.start:g} to {hit.end:g} s"
    return (
        f'<li><div class="preview">{preview}</div>'
        f'<p><span class="score">{hit.score:.3f}</span>{name}'
        f"<br>{escape(hit.kind)}{page}</p></li>"
    )
