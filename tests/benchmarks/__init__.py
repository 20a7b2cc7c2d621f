"""What the benchmark scripts in tests/ share."""
