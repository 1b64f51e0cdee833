"""The expected results of sampling, by definition, and parameters and logits for property tests."""

import torch
from hypothesis import strategies as st

from gptcore.sampling import ONE, SamplingParams, token_weights


def by_definition(logits: torch.Tensor, params: SamplingParams) -> dict[int, int]:
    """The tokens that the filters keep, and their weights, computed by a full sort in whole numbers."""
    weights = [int(w) for w in token_weights(logits[None], [params.temperature])[0].tolist()]
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))[: params.top_k or None]
    total, before, kept = sum(weights[i] for i in order), 0, {}
    for i in order:
        if before < params.top_p * total and weights[i] >= params.min_p * ONE and weights[i]:
            kept[i] = weights[i]
        before += weights[i]
    return dict(sorted(kept.items()))


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([5e-324, 0.1, 0.7, 1.0, 5.0, 1e9, 1.7e308]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 30]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.01]) | st.floats(5e-324, 1),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5]) | st.floats(0, 1),
)
# Of few values, so that some tokens are equally likely; and others so near that only their logits tell them apart.
VALUES = st.lists(
    st.floats(-30, 30, width=32)
    | st.sampled_from([0.0, -0.0, 1.0, 1.5, 2.0, 1.4e-45, 2.28e-38, 1 + 2**-23, 2 - 2**-23, -1e30]),
    min_size=1,
    max_size=60,
)
