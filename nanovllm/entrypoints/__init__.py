"""What users do with an engine beyond `generate`: one file for each feature."""
