"""How well patients are matched: `python -m tests.benchmarks.match_population --people 10000`.

Prints precision and recall over pairs of records, against who they are.
"""

import argparse
import collections
import itertools
import json
import time

from schemas.patient_matching import load_matching_rules
from tests.population import Population, population
from transforms.match_patients import Outcome, match


def measure(drawn: Population) -> dict[str, float]:
    """Returns counts and shares of pairs; `recall_with_review` counts what people are shown."""
    began = time.perf_counter()
    matched = match(load_matching_rules(), drawn.records)
    seconds = time.perf_counter() - began
    f = matched.features
    keys = list(zip(f.campus.to_pylist(), f.patient_id.to_pylist(), strict=True))
    truth = [drawn.person_of[key] for key in keys]
    linked = _pairs(matched.person.tolist())
    same = _pairs(truth)
    review = matched.pairs.where(matched.pairs.outcome == Outcome.REVIEW)
    shown = set(zip(review.left.tolist(), review.right.tolist(), strict=True)) - linked
    return {
        "records": len(keys),
        "true_pairs": len(same),
        "linked_pairs": len(linked),
        "wrong_links": len(linked - same),
        "precision": len(linked & same) / max(len(linked), 1),
        "recall": len(linked & same) / max(len(same), 1),
        "review_pairs": len(shown),
        "review_share_right": len(shown & same) / max(len(shown), 1),
        "recall_with_review": len((linked | shown) & same) / max(len(same), 1),
        "compared_pairs": len(matched.pairs.left),
        "seconds": round(seconds, 3),
    }


def _pairs(groups: list[int]) -> set[tuple[int, int]]:
    members = collections.defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    return {pair for rows in members.values() for pair in itertools.combinations(rows, 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(json.dumps(measure(population(options.people, options.seed)), indent=2))
