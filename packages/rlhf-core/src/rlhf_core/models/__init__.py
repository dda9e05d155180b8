"""Models: loading, ragged attention, the policy and its head."""
