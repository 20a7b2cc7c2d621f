"""From what a user gives to token ids, and from token ids to text."""
