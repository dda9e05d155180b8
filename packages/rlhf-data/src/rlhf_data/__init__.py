"""Data for post-training: rows to token ids once, packing, and an order that can be resumed."""
