"""Weight of each completion's tokens in the global loss: how token losses become one number.

    sequence-mean   1 / (S * n_b)      mean over sequences of their token means       GRPO (arXiv 2402.03300)
    token-mean      1 / N              mean over all tokens                           DAPO (arXiv 2503.14476)
    constant        1 / (S * limit)    token sums over a constant length              Dr. GRPO (arXiv 2503.20783)

S, N: trained sequences and tokens of the *global* batch; n_b: tokens of sequence b; limit: rollout.max_new_tokens. The
weights are worked out once, where the whole batch is known, and travel with the rows: a loss that sums weighted tokens
is then the global loss, however its rows are dealt over ranks and accumulation steps. Pure numpy, float64.
"""

from __future__ import annotations

import numpy as np

from tatar_dist.config.schema import Aggregation


def token_weights(lengths: np.ndarray, trained: np.ndarray, aggregation: Aggregation, limit: int) -> np.ndarray:
    """Return what each token of a sequence counts, (N,) float64; 0 if not trained or empty.

    Args:
        lengths: (N,) completion tokens of every sequence of the global batch.
        trained: (N,) bool; the others (groups dropped, truncated completions) enter neither loss nor normaliser.
        limit: the length a constant normaliser divides by.
    """
    lengths = np.asarray(lengths, np.float64)
    counted = np.asarray(trained, bool) & (lengths > 0)
    sequences, tokens = max(1, int(counted.sum())), max(1.0, float(lengths[counted].sum()))
    if aggregation == "sequence-mean":
        each = 1.0 / (sequences * np.maximum(lengths, 1.0))
    elif aggregation == "token-mean":
        each = np.full(len(lengths), 1.0 / tokens)
    else:
        each = np.full(len(lengths), 1.0 / (sequences * limit))
    return np.where(counted, each, 0.0)
