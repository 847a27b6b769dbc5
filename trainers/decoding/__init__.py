"""What a trainer writes into `generation_config.json`: the decoding that a model was trained for."""
