"""The proxy in front of the replicas, and its replies while no replica can answer."""
