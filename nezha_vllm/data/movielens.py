"""MovieLens 100K, read out of the PyPI distribution ``recbole``.

The data's licence forbids passing it on, so it is never copied into this project. RecBole itself is not imported: its
import needs packages that reading two text files does not.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from nezha_vllm.data import published
from nezha_vllm.data.recbole import RecBoleReader

NAME = "movielens-100k"
PUBLISHED = published.PUBLISHED["MovieLens 100K"]
INSTALL = "pip install --no-deps recbole==1.2.1"

_ARTICLES = "The|A|An|Il|La|Le|Les|L'|Lo|El|Los|Las|Der|Die|Das|De|Det|O"
_TRAILING_ARTICLE = re.compile(rf"^(?P<rest>[^()]+), (?P<article>{_ARTICLES})$")


def installed_folder() -> Path:
    """Folder of MovieLens 100K's atomic files inside the installed distribution. Raises ``FileNotFoundError``."""
    spec = find_spec("recbole")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "dataset_example" / "ml-100k"
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"{NAME} is read from the Python package recbole 1.2.1, which is not installed here; run\n  {INSTALL}\n"
        "or name a folder with ml-100k.inter and ml-100k.item by --recbole DIR"
    )


def reader(folder: Path | None = None, max_broken: float = 0.01) -> RecBoleReader:
    """Reader of the installed files or of those in ``folder``."""
    return RecBoleReader(folder or installed_folder(), max_broken, title_of=natural_title)


def natural_title(title: str) -> str:
    """``Visitors, The (Visiteurs, Les)`` → ``The Visitors (Les Visiteurs)``."""
    return re.sub(r"[^()]+", lambda part: _article_first(part.group()), title)


def _article_first(part: str) -> str:
    match = _TRAILING_ARTICLE.match(part.strip())
    if not match:
        return part
    article = match["article"]
    natural = article + ("" if article.endswith("'") else " ") + match["rest"]
    return part.replace(part.strip(), natural)
