"""What an engine can do beside generating; each file uses its public verbs."""
