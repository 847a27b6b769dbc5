"""Problems with checkable answers: rows are made from a seed, answers verified (which is a reward, too)."""
