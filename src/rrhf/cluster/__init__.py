"""The distributed engine: the stages on a Ray cluster (the extra ``rrhf[ray]``, docs/cluster.md)."""
