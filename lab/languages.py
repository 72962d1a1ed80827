"""Text in four languages, of which experiments are made: Debian's installation guide, a file for each section.

    apt-get download installation-guide-amd64  # on Debian; or from packages.debian.org/installation-guide-amd64
    dpkg -x installation-guide-amd64_*.deb debian
    python -m lab.languages debian languages
    python train.py --data languages --init-from smollm2 --expert lora

The guide is free under the GPL, version 2. Its sections are translations of one another, with commands and names in
common.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

from support.errors import BadInput
from support.runs.command_line import run_command

LANGUAGES = ("de", "fr", "it", "nl")
GUIDE = "usr/share/doc/installation-guide-amd64"
LEFT_OUT = ("index", "apd", "ape", "apf")  # contents, and the licence, which is English everywhere
AROUND = ("navheader", "navfooter", "toc")  # classes of what isn't text
BREAKS = {**dict.fromkeys(("li", "tr", "pre", "dt", "dd", "br"), "\n"),
          **dict.fromkeys(("p", "h1", "h2", "h3", "h4"), "\n\n")}


class Section(HTMLParser):
    """What there is to read in a page. Blanks count in <pre> only."""

    def __init__(self, page: str):
        super().__init__()
        self.parts, self.around, self.preformatted = [], [], 0  # around: the tags open around what isn't text
        self.feed(page)
        text = re.sub(r"[ \t]+\n", "\n", "".join(self.parts))
        self.text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

    def handle_starttag(self, tag: str, attributes: list) -> None:
        within = self.around and tag == "div"
        if within or tag in ("script", "style", "head") or dict(attributes).get("class") in AROUND:
            self.around.append(tag)
        self.preformatted += tag == "pre"
        self.parts.append(BREAKS.get(tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if self.around and tag == self.around[-1]:
            self.around.pop()
        self.preformatted -= tag == "pre"

    def handle_data(self, text: str) -> None:
        if not self.around:
            self.parts.append(text if self.preformatted else re.sub(r"\s+", " ", text))


def convert(package: Path, out: Path) -> None:
    """Raises BadInput, OSError."""
    for language in LANGUAGES:
        pages = sorted((package / GUIDE / language).glob("*.html"))
        if not pages:
            raise BadInput(f"{package}: holds no {GUIDE}/{language}; unpack the Debian package there")
        (out / language).mkdir(parents=True, exist_ok=True)
        for page in pages:
            text = Section(page.read_text(encoding="utf-8", errors="replace")).text
            if not page.name.startswith(LEFT_OUT) and len(text) > 400:
                (out / language / f"{page.stem}.txt").write_text(text, encoding="utf-8")


def from_command_line() -> None:
    if len(sys.argv) != 3:
        raise BadInput("give the folder of the unpacked package, and one for the text")
    convert(*map(Path, sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(run_command("lab.languages", from_command_line, "run it again"))
