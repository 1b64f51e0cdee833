"""What stands in front of the replicas, and what it answers while no replica can."""
