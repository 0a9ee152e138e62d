"""What tests share: a tiny world with planted faults, servers that misbehave, a browser, small models."""
