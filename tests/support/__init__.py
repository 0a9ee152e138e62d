"""What tests share: a tiny world with faults at will, servers that misbehave, a browser, small models."""
