"""RRHF's rivals, made of the same stages."""
