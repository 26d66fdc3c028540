"""Published sizes of data sets, so that who has the raw files sees at once whether a filter is the published one."""

from __future__ import annotations

from nezha_vllm.data.sequences import Counts

PUBLISHED = {
    "MovieLens 100K": Counts(943, 1_682, 100_000),
    "Yelp of the NEZHA paper": Counts(15_719, 11_383, 192_214),
    "Beauty of the NEZHA paper": Counts(52_204, 57_288, 394_908),
    "Games of the NEZHA paper": Counts(64_071, 33_614, 568_314),
    "Beauty 2014, 5-core": Counts(22_363, 12_101, 198_502),
    "Sports 2014, 5-core": Counts(35_598, 18_357, 296_337),
    "Toys 2014, 5-core": Counts(19_412, 11_924, 167_597),
    "Yelp of S3-Rec and LETTER": Counts(30_431, 20_033, 316_354),
    "Scientific of CollisionGenRec": Counts(8_317, 4_344, 58_492),
}


def verdict(name: str, counts: Counts) -> str:
    """What is published about ``counts``, or about data sets whose name shares a word with ``name``; else empty."""
    same = [title for title, published in PUBLISHED.items() if published == counts]
    if same:
        return f"these are the published counts of {same[0]}"
    words = set(name.lower().replace("_", " ").replace("-", " ").split())
    near = [f"{title}: {size}" for title, size in PUBLISHED.items() if title.lower().split()[0] in words]
    return "published counts differ: " + "; ".join(near) if near else ""
