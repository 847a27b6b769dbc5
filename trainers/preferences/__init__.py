"""Learning from pairs of answers: the masks of a score, the score itself, and its way into TRL's trainer."""
