"""Near-duplicate texts: MinHash finds who may be alike, the exact Jaccard similarity decides."""

from collections.abc import Iterable

SHINGLE_CHARACTERS = 5  # works for languages without spaces, too
N_PERMUTATIONS = 128
SEED = 42
MISSED = 1e-3  # share of pairs just at the threshold that the search may overlook


def near_duplicates(texts: Iterable[tuple[str, str]], threshold: float) -> dict[str, str]:
    """{id: the earlier id it repeats} of (id, text) whose shingles have Jaccard similarity >= threshold.

    Each text is compared with those before it that repeat nothing themselves. MinHash with banding (Broder 1997) may
    overlook a pair just at the threshold with probability MISSED; what it finds is checked exactly.
    """
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=threshold, num_perm=N_PERMUTATIONS, num_bands=_n_bands(threshold))
    kept: list[tuple[str, str]] = []
    repeated: dict[str, str] = {}
    for name, text in texts:
        found = shingles(text)
        sketch = RMinHash(num_perm=N_PERMUTATIONS, seed=SEED)
        sketch.update(sorted(found))
        alike = (kept[key] for key in sorted(index.query(sketch)))
        original = next((other for other, its in alike if jaccard(found, shingles(its)) >= threshold), None)
        if original is not None:
            repeated[name] = original
        else:
            index.insert(len(kept), sketch)
            kept.append((name, text))
    return repeated


def shingles(text: str) -> set[str]:
    """All runs of SHINGLE_CHARACTERS characters, without case and repeated spaces."""
    plain = " ".join(text.lower().split())
    return {plain[i : i + SHINGLE_CHARACTERS] for i in range(max(1, len(plain) - SHINGLE_CHARACTERS + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    """Shared elements as a share of all."""
    n_shared = len(a & b)
    return n_shared / (len(a) + len(b) - n_shared)


def _n_bands(threshold: float) -> int:
    """The fewest bands that overlook a pair at the threshold with probability MISSED at most."""
    options = [n for n in range(1, N_PERMUTATIONS + 1) if N_PERMUTATIONS % n == 0]
    return next(
        (n for n in options if (1 - threshold ** (N_PERMUTATIONS // n)) ** n <= MISSED),
        N_PERMUTATIONS,
    )
