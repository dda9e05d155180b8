"""Generation and scoring for post-training. Light: engines and their libraries are imported where they are used."""
