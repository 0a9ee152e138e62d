"""Scored responses → a reward model. It stands here, and not in ``rewards/``, because it trains as policies do."""
