"""From a checkpoint to a Hub repository."""
