"""Pictures of a run's page: inside it while they fit its budget, linked beside it where they don't."""

from __future__ import annotations

import base64
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from shards.errors import UserError
from shards.files.tensor_files import read_latent_facts
from shards.page.html_page import Child, Html, Section, join, tag
from train.report.read_run import SampledLatent

MEDIA_TYPES = {".jpg": "image/jpeg", ".png": "image/png", ".mp4": "video/mp4"}
MAX_STEPS_SHOWN = 12
SHEET = "samples/contact-sheet.jpg"
SIDE_BY_SIDE = "samples/side-by-side.mp4"


class Pictures:
    """Puts files into the page until its budget is spent, and then links them relative to it."""

    def __init__(self, page: Path, budget_bytes: int) -> None:
        self._folder = page.absolute().parent
        self._left = budget_bytes
        self.num_linked = 0

    def data(self, content: bytes, media_type: str) -> str | None:
        """A data: URL of the content; None where it would not fit any more."""
        size = len(content) * 4 // 3 + 40
        if size > self._left:
            return None
        self._left -= size
        return f"data:{media_type};base64,{base64.b64encode(content).decode()}"

    def file(self, path: Path) -> str | None:
        """The same of a file."""
        if path.stat().st_size * 4 // 3 + 40 > self._left:
            return None
        return self.data(path.read_bytes(), MEDIA_TYPES[path.suffix])

    def link(self, path: Path, text: str) -> Html:
        """A link to a file beside the page."""
        self.num_linked += 1
        href = quote(os.path.relpath(path.absolute(), self._folder).replace(os.sep, "/"))
        return tag("a", text, href=href)


def pictures_section(pictures: Pictures, found: Sequence[SampledLatent], run: Path) -> Section | None:
    """What was sampled on the way, a prompt a block, its steps in order; None where nothing was."""
    if not found:
        return None
    names = sorted({picture.name for picture in found})
    words: list[Child] = []
    if (run / SIDE_BY_SIDE).is_file():  # first in the page's budget, too
        source = pictures.file(run / SIDE_BY_SIDE)
        link = pictures.link(run / SIDE_BY_SIDE, "the samples side by side")
        words.append(tag("p", "From the first step, on the left, to the last: ", link, "."))
        words.append(source and _video(source, "samples of all prompts, a column a step", class_="wide"))
    blocks = [_prompt(pictures, [one for one in found if one.name == name]) for name in names]
    waiting = sum(one.video is None for one in found)
    if waiting:
        command = tag("code", f"wanprep decode --watch {shlex.quote(str(run))} -c CONFIG")
        words.append(tag("p", f"{waiting} of {len(found)} latents have no video yet: ", command, " makes them."))
    if (run / SHEET).is_file():
        words.append(tag("p", "All in one picture: ", pictures.link(run / SHEET, "the contact sheet"), "."))
    return Section("pictures", "Sampled videos", join((*words, *blocks)))


def _prompt(pictures: Pictures, found: Sequence[SampledLatent]) -> Html:
    shown = list(found)
    if len(shown) > MAX_STEPS_SHOWN:  # the first, the last, and evenly between
        places = {round(place * (len(found) - 1) / (MAX_STEPS_SHOWN - 1)) for place in range(MAX_STEPS_SHOWN)}
        shown = [found[place] for place in sorted(places)]
    left_out = f"; {len(shown)} of {len(found)} steps are shown" if len(shown) < len(found) else ""
    try:
        facts = read_latent_facts(found[-1].latent)
    except UserError as error:  # a picture is no reason to show no page
        facts = {"prompt": f"({error})"}
    kind = "image-to-video" if "first_frame" in facts else "text-to-video"
    head = tag("p", facts.get("prompt", ""), class_="prompt")
    note = tag("p", f"{kind}, seed {facts.get('seed', '?')}{left_out}", class_="quiet")
    newest_first = {one.step: _card(pictures, one, playing=one is found[-1]) for one in reversed(shown)}
    cards = [newest_first[one.step] for one in shown]
    return join((tag("h3", found[0].name), head, note, tag("div", *cards, class_="strip", tabindex=0, role="group",
                                                           aria_label=f"{found[0].name} by step")))  # fmt: skip


def _card(pictures: Pictures, picture: SampledLatent, *, playing: bool) -> Html:
    what = f"{picture.name} after step {picture.step:,}"
    media = None
    if playing and picture.video is not None and (source := pictures.file(picture.video)):
        media = _video(source, what)
    elif picture.still is not None and (source := pictures.file(picture.still)):
        media = tag("img", src=source, alt=what)
    links = [pictures.link(path, word) for path, word in ((picture.video, "video"), (picture.latent, "latent")) if path]
    foot = tag("figcaption", f"step {picture.step:,} · ", links[0], *(join((" · ", link)) for link in links[1:]))
    return tag("figure", media, foot)


def _video(source: str, label: str, **attributes: str) -> Html:
    switches = {"controls": True, "loop": True, "muted": True, "preload": "metadata", "playsinline": True}
    return tag("video", aria_label=label, src=source, **attributes, **switches)  # type: ignore[arg-type]
