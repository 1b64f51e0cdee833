"""What a run or a service will need and how long it will take, computed before it starts."""
