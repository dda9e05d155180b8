"""Recipes: loops of `rlhf generate`, `rlhf score` and `rlhf train`, each step a process of its own."""
